"""What is said of a model that cannot be exported: the cause, on one line, without the exporter's own texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tpeft_deploy import load_adapter
from tpeft_deploy.errors import TpeftError, UnsupportedBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.causes import cause_of

ROWS = torch.ones(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if mask is None else y * mask


class Eigenvalues(Net):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = x + torch.linalg.eig(self.linear.weight)[0].real
        return y


class ByValue(Net):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if y.sum() > 0 else -y


class ByBatch(Net):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * (1.0 if x.shape[0] == 3 else 2.0)


def broken() -> nn.Module:
    raise KeyError("weights.pt")


def class_of_net() -> Any:
    return Net, {"x": ROWS}


NO_FACTORY = {"a": 1}


def said(base: object, inputs: Any = None, shapes: Any = None) -> str:
    with pytest.raises(UnsupportedBase) as caught:
        load_base(base, example_inputs=inputs, dynamic_shapes=shapes).graph()
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "report" not in text
    assert "Next steps" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    ("net", "cause"),
    [
        (Eigenvalues, "export base Eigenvalues: operator aten.linalg_eig has no ONNX function. Compute"),
        (ByValue, "forward chooses by the values of a tensor at test_causes.py:"),
        (ByBatch, "axis 0 of input 'x' dynamic, and forward accepts only the size 3"),
    ],
)
def test_models_that_cannot_be_exported(
    net: Callable[[], nn.Module], cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cause in said(net(), {"x": ROWS})
    shown = capfd.readouterr()
    assert "def forward" not in shown.out + shown.err  # torch prints graphs of what it cannot trace
    assert "always_classified" not in shown.err


@pytest.mark.parametrize(
    ("inputs", "cause"),
    [
        ({"x": torch.ones(3, 5)}, r"forward fails on the example inputs (RuntimeError: mat1 and mat2 shapes"),
        ({"x": torch.ones(3, 5)}, r"got x float32[3, 5]. Give example_inputs that forward(x, mask) accepts"),
        ({"x": ROWS.long()}, "dtype"),
        ({"y": ROWS}, "unexpected keyword argument 'y'"),
        ({"mask": ROWS}, "missing 1 required positional argument: 'x'"),
        ({"x": ROWS, "mask": None}, "input 'mask': expected a torch.Tensor with values, got a NoneType. Leave it out"),
        ({"x": (ROWS, ROWS)}, "got a tuple. Wrap the module"),
        ({"x": np.ones((3, 4))}, "got a ndarray. Use torch.from_numpy"),
        ({"x": ROWS.to("meta")}, "on the meta device"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: dict[str, Any], cause: str) -> None:
    assert cause in said(Net(), inputs)


@pytest.mark.parametrize(
    ("shapes", "cause"),
    [
        ({"z": {0: "batch"}}, "expected a dict with the inputs x, got z"),
        ([{0: "batch"}], "expected a dict with the inputs x, got list"),
        ({"x": {5: "batch"}}, "input 'x': expected a dict of axis -> name for its 2 axes, got {5: 'batch'}"),
        ({"x": "batch"}, "got 'batch'"),
    ],
)
def test_dynamic_shapes_that_do_not_fit(shapes: Any, cause: str) -> None:
    assert cause in said(Net(), {"x": ROWS}, shapes)


@pytest.mark.parametrize(
    ("base", "cause"),
    [
        (Net, "expected a torch.nn.Module, got a class (Net). Make an instance"),
        (broken, "got a function (broken). Name it as 'package.module:function'"),
        (Net().state_dict(), "got a state dict (OrderedDict). Build its module"),
        ((Net(), {"x": ROWS}), "got a tuple (tuple). Pass the module as base"),
        (Net().to("meta"), "weight 'linear.weight': expected values in the CPU's memory, got a tensor on device meta"),
        (nn.LazyLinear(4), "weight 'weight': expected values in the CPU's memory, got a tensor uninitialised"),
        (f"{__name__}:broken", "the factory fails (KeyError: 'weights.pt')"),
        (f"{__name__}:class_of_net", "got a class (Net)"),
        (f"{__name__}:NO_FACTORY", "expected a callable 'NO_FACTORY', got dict"),
    ],
)
def test_bases_that_are_no_module(base: object, cause: str) -> None:
    assert cause in said(base, {"x": ROWS})


def test_a_reader_of_adapters_says_the_same_of_a_base(tmp_path: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(TpeftError, match=r"load base .*class_of_net: expected a torch.nn.Module, got a class"):
        load_adapter(tmp_path / "a.safetensors", base=f"{__name__}:class_of_net")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Constraints violated!\n  - Not all values of batch = L['x'].size()[0] in the range ... (4).".replace(
                "...", "are valid because batch was inferred to be a constant"
            ),
            "axis 0 of input 'x' dynamic, and forward accepts only the size 4",
        ),
        (
            "  - Not all values of b = L['past']['0.key'].size()[2] in it satisfy the generated guard b <= 8\nmore",
            "every size of axis 2 of input 'past.0.key'",
        ),
        ("There was no fake impl registered for <CustomOpDef(mine::op)>. This is", "custom operator mine::op"),
        (
            "\x1b[96mBroken\x1b[0m  here\n\nand a graph",
            "the torch exporter failed (RuntimeError: Broken here)",
        ),
        ("word " * 500, "the torch exporter failed (RuntimeError: word word"),
    ],
)
def test_what_other_versions_of_torch_say(text: str, cause: str) -> None:
    error = torch.onnx.errors.OnnxExporterError("Failed. Next steps")
    error.__cause__ = RuntimeError(text)
    found = cause_of(error)
    assert cause in found.problem
    assert len(found.problem) < 400

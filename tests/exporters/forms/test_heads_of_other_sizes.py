"""Heads of another size per task that are flattened, reshaped and joined afterwards, against PEFT's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tpeft_deploy import Adapter, Runtime, TuckerDelta, export_bundle, export_folded, load_adapter
from tpeft_deploy.errors import UnsupportedTarget

LIMIT = 1e-5


class Detector(nn.Module):
    """Two levels, each with a head of 4 coordinates and one of classes.

    Args:
        classes: outputs of the head of classes.
        style: "ssd" has positions times classes per row, "yolo" coordinates and classes times positions.
    """

    def __init__(self, classes: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.boxes = nn.Conv2d(6, 4, 1)
        self.classes = nn.Conv2d(6, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of all levels, joined along the positions."""
        fine = torch.relu(self.stem(x))
        levels = [fine, torch.relu(self.down(fine))]
        if self.style == "yolo":
            return torch.cat([torch.cat([self.boxes(y).flatten(2), self.classes(y).flatten(2)], 1) for y in levels], 2)
        scores = [self.classes(y).permute(0, 2, 3, 1) for y in levels]
        return torch.cat([y.reshape(y.shape[0], -1, y.shape[-1]).sigmoid() for y in scores], 1)


class Classifier(nn.Module):
    """A head whose answer goes through one more step.

    Args:
        classes: outputs of the head.
        step: "none", "softmax", "chunk" or "view".
    """

    def __init__(self, classes: int, step: str = "none") -> None:
        super().__init__()
        self.step = step
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The head's answer after the step."""
        y: torch.Tensor = self.head(torch.tanh(self.body(x)))
        if self.step == "softmax":
            return y.softmax(-1)
        if self.step == "chunk":
            first, second = y.chunk(2, -1)
            return first * second
        return y.reshape(y.shape[0], 2, -1) if self.step == "view" else y


def trained(make: Any, base: nn.Module, classes: int, place: Path, **options: Any) -> tuple[nn.Module, Adapter]:
    """A PEFT model around a module with a head of another size and the base's weights elsewhere, and its adapter."""
    torch.manual_seed(classes)
    module = make(classes)
    own = {name: value for name, value in base.state_dict().items() if value.shape == module.state_dict()[name].shape}
    module.load_state_dict(own, strict=False)
    model = peft.get_peft_model(module, peft.LoraConfig(init_lora_weights=False, r=2, **options)).eval()
    model.save_pretrained(str(place))
    return model, load_adapter(place)


def worst(got: np.ndarray | list[np.ndarray], expected: list[torch.Tensor]) -> float:
    errors = []
    for one, other in zip(got, expected, strict=True):
        assert one.shape == tuple(other.shape)
        errors.append(float(np.linalg.norm(one - other.numpy()) / np.linalg.norm(other.numpy())))
    return max(errors)


@pytest.mark.parametrize(("style", "plus"), [("ssd", 0), ("yolo", 4)])
def test_each_row_gets_the_columns_of_its_own_detection_head(tmp_path: Path, style: str, plus: int) -> None:
    torch.manual_seed(0)
    base = Detector(3, style).eval()
    options = {"target_modules": ["stem", "down"], "modules_to_save": ["classes"]}
    made = {f"of {n}": trained(lambda k: Detector(k, style), base, n, tmp_path / str(n), **options) for n in (2, 7)}
    x = torch.randn(3, 3, 6, 8)
    free = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}}
    names = {"of 2": "two", "of 7": "seven"}
    adapters = {names[key]: adapter for key, (_, adapter) in made.items()}
    bundle = export_bundle(
        base, adapters, tmp_path / "bundle", example_inputs={"x": x}, dynamic_shapes=free, folded=True
    )
    (port,) = bundle.manifest.outputs
    assert port.varies is not None
    assert (port.varies.override, port.varies.plus, bundle.manifest.rows) == ("classes.weight", plus, "each")
    other = torch.randn(3, 3, 10, 6)
    with torch.no_grad():
        expected = [base(other)[0], made["of 7"][0](other)[1], made["of 2"][0](other)[2]]
    got = Runtime(bundle.path, provider="cpu").run({"x": other.numpy()}, tasks=["base", "seven", "two"])
    assert worst(got["output"], expected) <= LIMIT


def test_one_task_changes_the_head_that_another_replaces(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, random = Classifier(5).eval(), np.random.default_rng(0)
    model, seven = trained(Classifier, base, 7, tmp_path / "7", target_modules=["body"], modules_to_save=["head"])
    change = TuckerDelta(np.eye(2), (random.standard_normal((5, 2)), random.standard_normal((8, 2))))
    same, narrow = Classifier(5).eval(), Classifier(2).eval()
    same.load_state_dict(base.state_dict())
    narrow.body.load_state_dict(base.body.state_dict())
    with torch.no_grad():
        same.head.weight += torch.from_numpy(change.dense())
    two = Adapter({}, {f"head.{name}": value.detach().numpy() for name, value in narrow.head.named_parameters()})
    x = torch.randn(4, 6)
    adapters = {"changed": Adapter({"head.weight": change}), "seven": seven, "two": two}
    bundle = export_bundle(base, adapters, tmp_path / "bundle", example_inputs={"x": x})
    with torch.no_grad():
        expected = [m(x)[i] for i, m in enumerate([base, same, model, narrow])]
    got = Runtime(bundle.path, provider="cpu").run({"x": x.numpy()}, tasks=["base", *adapters])
    assert worst(got["output"], expected) <= LIMIT


@pytest.mark.parametrize(
    ("step", "node", "alone"),
    [("softmax", "Softmax", True), ("chunk", "SplitToSequence", False), ("view", "Reshape", False)],
)
def test_a_step_that_no_other_size_passes_is_named(tmp_path: Path, step: str, node: str, alone: bool) -> None:
    base, head = Classifier(6, step).eval(), np.ones((8, 8), np.float32)
    adapter, x = Adapter({}, {"head.weight": head, "head.bias": head[0]}), torch.randn(3, 6)
    with pytest.raises(UnsupportedTarget, match=rf"'head\.\w+' another size.*\({node}\)"):
        export_bundle(base, {"a": adapter}, tmp_path / "bundle", example_inputs={"x": x})
    if alone:
        checks = export_folded(base, adapter, tmp_path / "m.onnx", example_inputs={"x": x})
        assert max(check.error for check in checks) <= LIMIT
    else:
        with pytest.raises(UnsupportedTarget, match=node):
            export_folded(base, adapter, tmp_path / "m.onnx", example_inputs={"x": x})

"""What may be filled up is what was proved: models that read their padding are refused, by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.helpers import nets
from tests.helpers.exporters import architectures
from tests.helpers.exporters.hugging_face import TEXT, saved
from tpeft_deploy import Adapter, Bundle, export_bundle, verify_bundle
from tpeft_deploy.bundle.manifest import Manifest, Port, _digest
from tpeft_deploy.errors import NotEquivalent, UnsupportedBase
from tpeft_deploy.exporters.bases.example_inputs import text_padding
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.planning import plan_bundle

PADS = {"input_ids": 0, "attention_mask": 0}
SEQUENCE = {0: "batch", 1: "sequence"}


class Pooling(nn.Module):
    """A mean over all positions, those of a mask alone, or none; a maximum, or each position by itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.up(x))
        if self.how == "masked mean":
            y = (y * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        elif self.how == "mean":
            y = y.mean(1) + 0 * mask.sum(1, keepdim=True)
        else:
            y = y * mask[:, :, None]
        scores: torch.Tensor = self.head(y)
        return scores


class Embedded(nn.Module):
    """A sum over tokens whose padding has a row of zeros, until an adapter changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.tanh(self.table(ids).sum(1)))
        return scores


class Positions(nn.Module):
    """Each position by itself, of at most so many."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.zeros(most, 4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(x + self.table[torch.arange(x.shape[1])])
        return scores


class Convolutions(nn.Module):
    """Convolutions over time that keep its length."""

    def __init__(self, *kernels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4, 4, k, padding=k // 2) for k in kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pooling(how: str) -> architectures.Built:
    inputs = {"x": random(2, 5, 4), "mask": torch.ones(2, 5)}
    return architectures.randomise(Pooling(how)), inputs, {"x": SEQUENCE, "mask": SEQUENCE}


def convolutions(*kernels: int) -> architectures.Built:
    return architectures.randomise(Convolutions(*kernels)), {"x": random(2, 4, 9)}, {"x": {0: "batch", 2: "time"}}


def embedded() -> architectures.Built:
    module = architectures.randomise(Embedded())
    module.get_parameter("table.weight").data[0] = 0
    ids = torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    return module, {"ids": ids}, {"ids": SEQUENCE}


def export(built: architectures.Built, path: Path, padding: dict[str, int | float] | None, **rest: Any) -> Bundle:
    module, inputs, shapes = built
    return export_bundle(
        module, rest.pop("adapters", {}), path, example_inputs=inputs, dynamic_shapes=shapes, padding=padding, **rest
    )


def padded(bundle: Bundle) -> list[dict[str, Any]]:
    return [dict(check) for check in bundle.manifest.gate if check["form"] == "padded"]


def test_a_bert_may_be_filled_up_and_answers_as_if_it_were_not(tmp_path: Path) -> None:
    module, inputs, shapes = architectures.bert()
    adapter = nets.adapter_for(module, {"bert.encoder.layer.0.attention.self.query.weight": (2, 2)}, seed=1)
    bundle = export((module, inputs, shapes), tmp_path / "b", dict(PADS), adapters={"a": adapter})
    manifest = bundle.manifest
    assert {port.name: port.pad for port in manifest.inputs} == PADS
    assert manifest.paddable == {"sequence"}
    assert Manifest.from_json(manifest.to_json(), source="it") == manifest
    checks = padded(bundle)
    assert {check["task"] for check in checks} == {"base", "a", "probe 0"}
    # base.onnx and two banked graphs for the base, these for the others; two lengths, and four in one batch.
    assert [check["sizes"] for check in checks if check["task"] == "a"] == [
        sizes
        for sizes in (
            {"batch": 2, "sequence": 8},
            {"batch": 2, "sequence": 14},
            {"batch": 8, "sequence": 14},
        )
        for _ in range(2)
    ]
    assert len(checks) == (3 + 2 + 2) * 3
    assert all(check["error"] <= check["limit"] == 1e-5 for check in checks)

    # Against the module itself, in lengths of which none was proved.
    session = compare.open_session(bundle.path / "base.onnx")
    lengths = [3, 11, 9]
    batch = {name: np.zeros((3, 11), np.int64) for name in PADS}
    rows = [torch.randint(0, 50, (1, length)) for length in lengths]
    for row, ids in enumerate(rows):
        batch["input_ids"][row, : lengths[row]] = ids[0]
        batch["attention_mask"][row, : lengths[row]] = 1
    got = compare.run(session, batch, {})["logits"]
    for row, ids in enumerate(rows):
        with torch.no_grad():
            expected = functional_call(module, {}, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert compare.relative_error(got[row : row + 1], expected.logits.numpy()) <= 1e-5


@pytest.mark.parametrize(
    ("built", "padding", "names"),
    [
        (pooling("masked mean"), {"x": 0.5, "mask": 0}, {"sequence"}),
        (pooling("each"), {"x": -1, "mask": 0}, {"sequence"}),
        # What a convolution with a border of zeros sees beyond its end is what it is filled up with.
        (convolutions(3), {"x": 0}, {"time"}),
        (convolutions(1, 1), {"x": 7.5}, {"time"}),
    ],
    ids=["masked mean", "each position", "one convolution", "pointwise"],
)
def test_models_that_do_not_see_their_padding(
    tmp_path: Path, built: architectures.Built, padding: dict[str, int | float], names: set[str]
) -> None:
    bundle = export(built, tmp_path / "b", padding)
    assert bundle.manifest.paddable == names
    assert {port.name: port.pad for port in bundle.manifest.inputs} == padding
    graphs = sum(file.startswith("banked") for file in bundle.manifest.files)
    assert len(padded(bundle)) == (1 + graphs + graphs) * 3


@pytest.mark.parametrize(
    ("built", "padding", "message"),
    [
        (pooling("mean"), {"x": 0, "mask": 0}, "answers of task 'base' change at batch 2, sequence 6"),
        (pooling("masked mean"), {"x": 0, "mask": 1}, "answers of task 'base' change at batch 2, sequence 6"),
        (convolutions(3), {"x": 1}, "answers of task 'base' change at batch 2, time 10"),
        (convolutions(3, 3), {"x": 0}, "answers of task 'base' change at batch 2, time 10"),
        (embedded(), {"ids": 20}, "the base does not run on it"),
        (architectures.waves(), {"x": 0}, "change at batch 2, length 23"),
        (architectures.attention_encoder(), {"x": 0}, "answers of task 'base' change"),
    ],
    ids=["mean", "wrong mask", "ones", "two convolutions", "unknown token", "strides", "attention"],
)
def test_models_that_see_their_padding_are_refused(
    tmp_path: Path, built: architectures.Built, padding: dict[str, int | float], message: str
) -> None:
    with pytest.raises(NotEquivalent, match=message) as caught:
        export(built, tmp_path / "b", padding)
    assert str(caught.value).startswith(f"pad {next(iter(padding))} with")
    assert not (tmp_path / "b").exists()


def test_adapters_that_are_added_later_count(tmp_path: Path) -> None:
    """Neither the base nor the adapter at hand shows the padding token; another one may."""
    delta = nets.delta((20, 8), (2, 2), 0)
    assert delta.factors[0] is not None
    delta.factors[0][0] = 0
    message = "answers of task 'probe 0' change at batch 2, sequence 7"
    with pytest.raises(NotEquivalent, match=message):
        export(embedded(), tmp_path / "b", {"ids": 0}, adapters={"a": Adapter({"table.weight": delta})})


def test_an_example_that_proves_nothing_is_refused(tmp_path: Path) -> None:
    module, inputs, shapes = pooling("masked mean")
    hidden = torch.ones(2, 5)
    hidden[:, -1] = 0
    with pytest.raises(NotEquivalent, match="last of sequence 5 in the example: expected answers that depend on it"):
        export((module, inputs | {"mask": hidden}, shapes), tmp_path / "b", {"x": 0, "mask": 0})


@pytest.mark.parametrize("most", [11, 12])
def test_absolute_positions_end_somewhere(tmp_path: Path, most: int) -> None:
    built = architectures.randomise(Positions(most)), {"x": random(2, 5, 4)}, {"x": SEQUENCE}
    if most == 12:
        assert export(built, tmp_path / "b", {"x": 0}).manifest.paddable == {"sequence"}
        return
    with pytest.raises(NotEquivalent, match=r"expected a base that runs at .*sequence 12.*Give shorter example inputs"):
        export(built, tmp_path / "b", {"x": 0})


BYTES = {"x": random(2, 5, 4), "mask": torch.ones(2, 5, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ({"y": 0}, "pad input 'y' of base .*: expected one of x, mask"),
        ({"x": 0, "mask": 0.5}, "pad input 'mask' .* expected a number that int8 holds, got 0.5"),
        ({"x": 0, "mask": 200}, "that int8 holds, got 200"),
        ({"x": 1e39, "mask": 0}, r"that float32 holds, got 1e\+39"),
        ({"x": float("nan"), "mask": 0}, "that float32 holds, got nan"),
        ({"x": float("inf"), "mask": 0}, "that float32 holds, got inf"),
        ({"x": 0}, r"got none for mask \(batch x sequence\)\. Declare the other inputs too"),
    ],
)
def test_what_cannot_be_declared(padding: dict[str, int | float], message: str) -> None:
    module, _, shapes = pooling("each")
    with pytest.raises(UnsupportedBase, match=message):
        plan_bundle(module, {}, name="b", example_inputs=BYTES, dynamic_shapes=shapes, padding=padding)


def test_an_input_without_a_free_axis_cannot_be_padded() -> None:
    module, inputs = nets.text_net()
    for shapes in (None, {"ids": {1: "sequence"}}):
        with pytest.raises(UnsupportedBase, match="batch"):
            plan_bundle(module, {}, name="b", example_inputs=inputs, dynamic_shapes=shapes, padding={"ids": 0})


def test_values_take_the_kind_of_their_input(tmp_path: Path) -> None:
    module, _, shapes = pooling("each")
    bundle = export((module, BYTES, shapes), tmp_path / "b", {"x": 0.0, "mask": 0.0})
    pads = {port.name: port.pad for port in bundle.manifest.inputs}
    assert json.dumps(pads) == '{"x": 0.0, "mask": 0}'


def test_a_cache_has_no_end_to_fill_up(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "hf", "LlamaForCausalLM", **TEXT))
    assert base.padding == {}
    with pytest.raises(UnsupportedBase, match=r"pad input 'input_ids' .* every input which has it declares.*by itself"):
        plan_bundle(base, {}, name="b", padding=dict(PADS))


@pytest.mark.parametrize(
    ("name", "sizes", "pads"),
    [
        ("BertForSequenceClassification", {"pad_token_id": 3}, [3, 0, 0]),
        ("RobertaForTokenClassification", {"pad_token_id": 1, "type_vocab_size": 1}, [1, 0]),
    ],
)
def test_text_models_of_hugging_face_are_tried_by_themselves(
    tmp_path: Path, name: str, sizes: dict[str, Any], pads: list[int]
) -> None:
    path = saved(tmp_path / "hf", name, **TEXT | sizes)
    bundle = export_bundle(path, {}, tmp_path / "b")
    assert [port.pad for port in bundle.manifest.inputs] == pads
    assert bundle.manifest.paddable == {"sequence"}


def test_other_names_of_inputs_are_filled_up_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "hf", "BertModel", **TEXT)
    base = load_base(path, rename={"input_ids": "tokens"})
    assert base.padding == {"tokens": 0, "attention_mask": 0, "token_type_ids": 0}
    assert load_base(path, example_inputs=architectures.tokens()).padding == PADS


@pytest.mark.parametrize(("token", "pad"), [(7, 7), (None, 0), (-1, 0), (40, 0)])
def test_a_padding_token_is_one_of_the_vocabulary(token: int | None, pad: int) -> None:
    module = nn.Module()
    module.config = SimpleNamespace(vocab_size=40, pad_token_id=token)  # type: ignore[assignment]
    assert text_padding(module) == {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}


def test_an_own_attempt_that_fails_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, inputs, shapes = pooling("mean")
    base = load_base(module, example_inputs=inputs, dynamic_shapes=shapes)
    base.padding = {"x": 0, "mask": 0}
    with caplog.at_level(logging.WARNING):
        manifest = export_bundle(base, {}, tmp_path / "b").manifest
    assert [port.pad for port in manifest.inputs] == [None, None]
    assert manifest.paddable == set()
    assert "padded" not in {check["form"] for check in manifest.gate}
    assert "rows of different lengths will not share a run: pad x with 0, mask with 0" in caplog.text
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert export_bundle(base, {}, tmp_path / "none", padding={}).manifest.paddable == set()
    assert caplog.text == ""


def test_two_sizes_and_graphs_for_the_cpu(tmp_path: Path) -> None:
    """Depthwise pointwise layers: every pixel by itself, of two free sizes."""
    module = nn.Sequential(nn.Conv2d(16, 16, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 3, 1))
    built = architectures.randomise(module), {"input": random(2, 16, 4, 6)}, {"input": {0: "batch", 2: "h", 3: "w"}}
    bundle = export(
        built,
        tmp_path / "b",
        {"input": 0},
        adapters={"a": Adapter({"2.weight": nets.delta((3, 16, 1, 1), (2, 2, 1, 1), 0)})},
    )
    assert bundle.manifest.paddable == {"h", "w"}
    assert {(check["sizes"]["h"], check["sizes"]["w"]) for check in padded(bundle)} == {(5, 7), (11, 13)}


def test_verify_proves_the_padding_again(tmp_path: Path) -> None:
    bundle = export(pooling("masked mean"), tmp_path / "b", {"x": 0, "mask": 0})
    checks = [
        check for check in verify_bundle(bundle.path, report=tmp_path / "page.html").checks if check.form == "padded"
    ]
    assert [(check.task, dict(check.sizes)) for check in checks] == [
        (check["task"], check["sizes"]) for check in padded(bundle)
    ]
    manifest = bundle.manifest
    wrong = tuple(Port(p.name, p.dtype, p.shape, pad=1) for p in manifest.inputs)
    text = replace(manifest, inputs=wrong).to_json()
    (bundle.path / "manifest.json").write_text(text)
    with pytest.raises(NotEquivalent, match="check the padded export of task 'base'"):
        verify_bundle(bundle.path)


def test_which_names_of_a_manifest_may_be_filled_up(conv_bundle: Bundle) -> None:
    def paddable(*ports: tuple[tuple[int | str, ...], int | None]) -> set[str]:
        inputs = tuple(Port(f"i{n}", "float32", shape, pad=pad) for n, (shape, pad) in enumerate(ports))
        return set(replace(conv_bundle.manifest, inputs=inputs).paddable)

    assert paddable((("batch", "a", 3, "b"), 0)) == {"a", "b"}
    assert paddable((("batch", "a", "b"), 0), (("batch", "b"), None)) == {"a"}
    assert paddable((("batch", "a"), 0), (("batch", "past + a"), 0)) == set()
    assert paddable((("batch", "2*a"), 0)) == set()
    assert paddable((("batch", "a", "a"), 0), (("batch",), None), ((), None)) == {"a"}
    assert paddable((("batch", 3), 0)) == set()


def test_manifests_without_the_field_are_read(conv_bundle: Bundle) -> None:
    document = json.loads(conv_bundle.manifest.to_json())
    assert all(port.pop("pad") is None for port in document["inputs"] + document["outputs"])
    document["digest"] = _digest(document)
    assert Manifest.from_json(json.dumps(document), source="it") == conv_bundle.manifest

"""Bundles with quantised bases against PEFT on the values that the few bits stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from tests.helpers.exporters.dequantised import dequantised_module
from tests.helpers.exporters.small_decoders import made, trained
from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.errors import AdapterError
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.verify import verify_bundle
from tpeft_deploy.runtime.folding import merge

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
TASKS = ["b", "base", "a", "b"]


class Net(nn.Module):
    """Convolutions, one of them depthwise, and a linear layer of a width that is no multiple of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 40, 3, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.b = nn.Conv2d(40, 40, 3, groups=40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3)))
        return y


class Bert(BertModel):  # type: ignore[misc]
    """A BERT that returns its states alone."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = super().forward(input_ids).last_hidden_state
        return states


def conv() -> tuple[nn.Module, dict[str, torch.Tensor], list[str]]:
    torch.manual_seed(0)
    return Net().eval(), {"x": torch.randn(2, 3, 8, 8)}, ["a", "head"]


def bert() -> tuple[nn.Module, dict[str, torch.Tensor], list[str]]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=40, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        initializer_range=0.3, max_position_embeddings=8,
    )  # fmt: skip
    return (
        Bert(config, add_pooling_layer=False).eval(),
        {"input_ids": torch.randint(50, (2, 7))},
        ["query", "key", "value", "dense"],
    )


MODELS = {"conv": conv, "bert": bert}


def saved(module_name: str, place: Path, **options: Any) -> dict[str, Path]:
    for seed, task in enumerate(("a", "b")):
        module, _, targets = MODELS[module_name]()
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, target_modules=targets, init_lora_weights=False, **options)
        get_peft_model(module, config).save_pretrained(place / task)
    return {task: place / task for task in ("a", "b")}


def exported(name: str, place: Path, lora: dict[str, Any] | None = None, **options: Any) -> tuple[Bundle, nn.Module]:
    module, inputs, _ = MODELS[name]()
    adapters = {task: load_adapter(own, base=module) for task, own in saved(name, place, **(lora or {})).items()}
    return export_bundle(module, adapters, place / "bundle", example_inputs=inputs, **options), module


def peft_answer(module: nn.Module, adapter: Path | None, row: torch.Tensor) -> np.ndarray[Any, Any]:
    model = module if adapter is None else PeftModel.from_pretrained(module, str(adapter)).eval()
    with torch.no_grad():
        answer: np.ndarray[Any, Any] = model(row)[0].numpy()
    return answer


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_all_tasks_are_those_of_peft_on_the_dequantised_module(name: str, form: Any, tmp_path: Path) -> None:
    bundle, module = exported(name, tmp_path, quantise=form, activations="float")
    assert bundle.manifest.rows == "each"
    assert {bundle.oracle(task)["oracle"].partition(" ")[0] for task in "ab"} == {"peft"}
    _, inputs, _ = MODELS[name]()
    (key, example), *_ = inputs.items()
    batch = example.repeat(2, *[1] * (example.ndim - 1)).flip(-1)
    rough = dequantised_module(module, bundle.path / "base.onnx")
    with Runtime(bundle.path, provider="cpu") as runtime:
        (mixed,) = runtime.run({key: batch.numpy()}, tasks=TASKS).values()
        for row, task in enumerate(TASKS):
            adapter = None if task == "base" else tmp_path / task
            expected = peft_answer(dequantised_module(module, bundle.path / "base.onnx"), adapter, batch[row : row + 1])
            (alone,) = runtime.run({key: batch[row : row + 1].numpy()}, task=task).values()
            for got in (np.asarray(mixed[row]), alone[0]):
                assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected), task
    assert all(check.error <= check.limit for check in verify_bundle(bundle.path).checks)
    assert bundle.manifest.quantised is not None
    with torch.no_grad():
        got, expected = rough(example).double().numpy(), module(example).double().numpy()
    (deviation,) = bundle.manifest.quantised.outputs.values()
    assert deviation.error >= np.linalg.norm(got - expected) / np.linalg.norm(expected) * 0.999
    assert deviation.agreement is None
    cosine = (got * expected).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert deviation.cosine <= cosine.min() + 1e-6


def test_graphs_share_the_quantised_weights_and_verify_knows_the_base(tmp_path: Path) -> None:
    bundle, module = exported("bert", tmp_path, quantise="int4")
    plain, _ = exported("bert", tmp_path / "plain")
    assert bundle.base_digest == plain.base_digest
    assert bundle.manifest.weight_bytes < 0.6 * plain.manifest.weight_bytes
    assert bundle.manifest.quantised is not None
    for file in ("base.onnx", "factored.onnx", "banked.onnx"):
        model = onnx.load(bundle.path / file, load_external_data=False)
        kept = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
        names = {tensor.name for tensor in kept}
        assert {f"{name}.int4" for name in bundle.manifest.quantised.weights} <= names
        assert not set(bundle.manifest.quantised.weights) & names
    _, inputs, _ = bert()
    found = verify_bundle(bundle.path, base=load_base(module, example_inputs=inputs))
    assert all(check.error <= check.limit for check in found.checks)


def test_a_quantised_weight_is_not_folded_into_at_run_time(tmp_path: Path) -> None:
    bundle, _ = exported("bert", tmp_path, quantise="int8")
    with pytest.raises(AdapterError, match=r"got a quantised one.*Serve the task from the bank"):
        merge.weights(bundle, bundle.adapter("a"))


def test_changes_that_derive_from_weights_are_proved_before_they_are_quantised(tmp_path: Path) -> None:
    bundle, _ = exported("bert", tmp_path, {"use_dora": True}, quantise="int4")
    assert bundle.oracle("a")["oracle"] == "merged"
    assert "agrees before they are quantised" in bundle.oracle("a")["reason"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "int4"),
        ("gpt2", "int8"),
        pytest.param("llama", "int8", marks=pytest.mark.thorough),
        pytest.param("gpt2", "int4", marks=pytest.mark.thorough),
    ],
)
def test_tokens_are_those_of_generate_on_the_dequantised_model(name: str, form: Any, tmp_path: Path) -> None:
    adapters = trained(name, tmp_path)
    model = made(name)
    loaded = {task: load_adapter(path, base=model) for task, path in adapters.items()}
    bundle = export_bundle(model, loaded, tmp_path / "bundle", generation=True, quantise=form, activations="float")
    prompts = [[1, 5, 9, 3], [2, 7], [4]]
    with Runtime(bundle.path, provider="cpu") as runtime:
        got = runtime.generate(prompts, tasks=["a", "base", "b"], max_new_tokens=12)
    for tokens, task, prompt in zip(got, ("a", "base", "b"), prompts, strict=True):
        own: Any = dequantised_module(made(name), bundle.path / "base.onnx")
        if task != "base":
            own = PeftModel.from_pretrained(own, str(adapters[task])).merge_and_unload()
        ids = torch.tensor([prompt])
        found = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert list(tokens) == found[0, len(prompt) :].tolist(), task
    assert bundle.manifest.quantised is not None
    assert bundle.manifest.quantised.outputs["logits"].agreement is not None

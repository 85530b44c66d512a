"""Hugging Face model directories as bases: what comes out of ONNX Runtime against the transformers model itself."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.exporters.hugging_face import SIZES, TEXT, saved
from tpeft_deploy.errors import MissingExtra, UnsupportedBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.graph.weights_and_shapes import optimize
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Outputs

Inputs = dict[str, torch.Tensor]
SHARED = ["relative_attention", "share_att_key"]


def loaded(path: Path | str) -> TorchBase:
    base = load_base(path)
    assert isinstance(base, TorchBase)
    return base


def tensors_of(base: TorchBase) -> Inputs:
    return {name: torch.from_numpy(array) for name, array in base.inputs.items()}


def plain(path: Path, name: str) -> nn.Module:
    model: nn.Module = getattr(transformers, name).from_pretrained(path, attn_implementation="eager")
    return model.eval()


def check(base: TorchBase, path: Path, others: Inputs, expected: Callable[[Inputs], Outputs]) -> ir.Model:
    """Compare at the traced sizes and at others, where every dynamic axis differs."""
    for name, value in base.inputs.items():
        for axis in base.dynamic_shapes[name]:
            assert 2 <= value.shape[axis] != others[name].shape[axis], f"{name}, axis {axis}"
    model = base.graph()
    assert [value.name for value in model.graph.inputs] == list(base.inputs)
    optimize(model, inline=True)
    ir.save(model, path / "model.onnx")
    session = compare.open_session(path / "model.onnx")
    for inputs in (tensors_of(base), others):
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        wanted, got = expected(inputs), compare.run(session, arrays, {})
        assert list(got) == list(wanted)
        for name, array in wanted.items():
            assert got[name].shape == array.shape
            assert compare.relative_error(got[name], array) <= 1e-5, name
    return model


def direct(path: Path, name: str) -> Callable[[Inputs], Outputs]:
    model = plain(path, name)

    def run(inputs: Inputs) -> Outputs:
        with torch.no_grad():
            return {key: tensor.numpy() for key, tensor in model(**inputs).items() if isinstance(tensor, torch.Tensor)}

    return run


@pytest.mark.parametrize(
    ("name", "sizes", "traced", "other", "outputs"),
    [
        (
            "ConvNextV2ForImageClassification",
            {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "image_size": 64, "num_labels": 4},
            (2, 3, 96, 128),
            (3, 3, 64, 160),
            ["logits"],
        ),
        (
            "ViTForImageClassification",
            {**SIZES, "image_size": 32, "patch_size": 8, "num_channels": 1, "num_labels": 4},
            (2, 1, 32, 32),
            (5, 1, 32, 32),
            ["logits"],
        ),
        (
            "Dinov2Model",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
            (2, 3, 84, 70),
            (3, 3, 28, 56),
            ["last_hidden_state", "pooler_output"],
        ),
    ],
)
def test_models_of_images(
    tmp_path: Path,
    name: str,
    sizes: dict[str, Any],
    traced: tuple[int, ...],
    other: tuple[int, ...],
    outputs: list[str],
) -> None:
    base = loaded(str(saved(tmp_path, name, **sizes)))
    assert {key: tuple(value.shape) for key, value in base.inputs.items()} == {"pixel_values": traced}
    expected = direct(tmp_path, name)
    assert list(expected(tensors_of(base))) == outputs
    check(base, tmp_path, {"pixel_values": torch.randn(other)}, expected)


@pytest.mark.parametrize(
    ("name", "sizes", "inputs", "outputs"),
    [
        ("BertForSequenceClassification", {"num_labels": 4}, 3, ["logits"]),
        pytest.param("BertForTokenClassification", {"num_labels": 4}, 3, ["logits"], marks=pytest.mark.thorough),
        ("BertModel", {"num_hidden_layers": 2}, 3, ["last_hidden_state", "pooler_output"]),
        (
            "DebertaV2ForSequenceClassification",
            {
                **dict.fromkeys(SHARED, True),
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 8,
                "norm_rel_ebd": "layer_norm",
                "type_vocab_size": 0,
                "num_labels": 4,
            },
            2,
            ["logits"],
        ),
    ],
)
def test_models_of_text(tmp_path: Path, name: str, sizes: dict[str, Any], inputs: int, outputs: list[str]) -> None:
    base = loaded(str(saved(tmp_path, name, **TEXT | sizes)))
    assert list(base.inputs) == ["input_ids", "attention_mask", "token_type_ids"][:inputs]
    assert {tuple(value.shape) for value in base.inputs.values()} == {(2, 7)}
    others = {key: torch.randint(0, 2, (3, 12)) for key in base.inputs}
    others["attention_mask"] = torch.ones(3, 12, dtype=torch.int64)
    others["attention_mask"][1, 9:] = 0
    expected = direct(tmp_path, name)
    assert list(expected(tensors_of(base))) == outputs
    check(base, tmp_path, others, expected)


def cached(path: Path) -> Callable[[Inputs], Outputs]:
    """The model as transformers' own generation calls it, positions counted from the mask."""
    model = plain(path, "LlamaForCausalLM")

    def run(inputs: Inputs) -> Outputs:
        tensors = list(inputs.values())
        cache = transformers.DynamicCache(list(zip(tensors[2::2], tensors[3::2], strict=True)))
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(0)[:, -inputs["input_ids"].shape[1] :]
        with torch.no_grad():
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                position_ids=positions,
                use_cache=True,
                **{name: cache},
            ).logits
        present = {"logits": logits.numpy()}
        for index, layer in enumerate(cache.layers):
            present |= {f"present.{index}.key": layer.keys.numpy(), f"present.{index}.value": layer.values.numpy()}
        return present

    return run


def with_past(base: TorchBase, batch: int, sequence: int, past: int) -> Inputs:
    inputs = {"input_ids": torch.randint(0, 40, (batch, sequence))}
    inputs["attention_mask"] = torch.ones(batch, past + sequence, dtype=torch.int64)
    for name, value in list(base.inputs.items())[2:]:
        inputs[name] = torch.randn(batch, value.shape[1], past, value.shape[3])
    return inputs


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_causal_models_with_a_cache(tmp_path: Path, tied: bool) -> None:
    count = 1 if tied else 2
    sizes = TEXT | {"num_key_value_heads": 1, "num_hidden_layers": count}
    saved(tmp_path, "LlamaForCausalLM", **sizes, tie_word_embeddings=tied)
    base = loaded(tmp_path)
    layers = [f"past_key_values.{layer}.{what}" for layer in range(count) for what in ("key", "value")]
    assert list(base.inputs) == ["input_ids", "attention_mask", *layers]
    assert [tuple(value.shape) for value in base.inputs.values()] == [(2, 7), (2, 11), *[(2, 1, 4, 8)] * 2 * count]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= {*base.weights}
    assert base.ties == ((("model.embed_tokens.weight", "lm_head.weight"),) if tied else ())
    expected, others = cached(tmp_path), with_past(base, 3, 5, 9)
    others["attention_mask"][1, :2] = 0
    model = check(base, tmp_path, others, expected)
    shapes = {str(value.name): [str(size) for size in value.shape or ()] for value in model.graph.inputs}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "past + sequence"]
    assert shapes["past_key_values.0.value"] == ["batch", "1", "past", "8"]

    session = compare.open_session(tmp_path / "model.onnx")
    for inputs in (with_past(base, 3, 5, 0), with_past(base, 1, 1, 6)):
        got = compare.run(session, {name: tensor.numpy() for name, tensor in inputs.items()}, {})
        assert all(compare.relative_error(got[name], array) <= 1e-5 for name, array in expected(inputs).items())


def test_weights_as_they_are_stored(tmp_path: Path) -> None:
    path = saved(tmp_path, "BertModel", **TEXT)
    transformers.BertModel.from_pretrained(path, dtype=torch.float16).save_pretrained(path)
    base = loaded(path)
    stored = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.equal(tensor, base.module.state_dict()[name]) for name, tensor in stored.items())


def bert(path: Path) -> Path:
    return saved(path, "BertForSequenceClassification", **TEXT)


def edited(path: Path, **entries: object) -> Path:
    config = json.loads((bert(path) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))
    return path


def headless(path: Path) -> Path:
    tensors = load_file(bert(path) / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("classifier")},
        path / "model.safetensors",
        {"format": "pt"},
    )
    return path


def pickled(path: Path) -> Path:
    torch.save(load_file(bert(path) / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def beside_an_adapter(path: Path) -> Path:
    (bert(path) / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')
    return path


def t5(path: Path) -> Path:
    return saved(
        path, "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40
    )


def clip(path: Path) -> Path:
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**SIZES, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, r"expected a Hugging Face model directory.*got a directory without config.json"),
        (headless, r"every weight.*got no weights for classifier.bias, classifier.weight\. Write the directory again"),
        (
            lambda path: edited(path, architectures=["MyOwnModel"]),
            "a model class of transformers.*'MyOwnModel'.*package",
        ),
        (lambda path: edited(path, architectures=["pipeline"]), "a model class of transformers.*'pipeline'"),
        (lambda path: edited(path, architectures=None), "name the model's class under 'architectures', got None"),
        (lambda path: edited(path, hidden_size=24), "transformers cannot load it"),
        (lambda path: edited(path, quantization_config={"bits": 4}), "got quantised ones"),
        (pickled, r"expected weights in model.safetensors.*got neither.*save_pretrained"),
        (beside_an_adapter, "got a directory with a PEFT adapter in it"),
        (t5, "texts or of images alone.*T5ForConditionalGeneration.*parts one by one.*package.module:function"),
        (clip, "texts or of images alone.*CLIPModel, which takes input_ids, pixel_values.*package.module:function"),
        (
            lambda path: saved(
                path, "MambaForCausalLM", hidden_size=8, num_hidden_layers=1, vocab_size=20, state_size=4
            ),
            "layers that keep keys and values.*MambaForCausalLM",
        ),
        (
            lambda path: saved(path, "LlamaForSequenceClassification", **TEXT),
            r"does not run on inputs of shapes \(2, 7\).*padding token",
        ),
        (
            lambda path: path / "no" / "such",
            "expected package.module:factory, an .onnx file, or a Hugging Face model directory",
        ),
    ],
)
def test_directories_that_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UnsupportedBase, match=message) as caught:
        load_base(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_weights_that_the_model_has_no_use_for_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = loaded(edited(tmp_path, architectures=["BertModel"]))
    assert "classifier.weight" not in base.weights
    assert "BertModel has no use for the weights classifier.bias, classifier.weight" in caplog.text


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bert(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tpeft-deploy\[hf\]'"):
        load_base(path)

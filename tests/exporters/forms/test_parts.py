"""Parts of a model exported with adapters of the whole: the oracle is PEFT's whole model, asked for the part alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.helpers.formats.trained import adapted
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.cli import main
from tpeft_deploy.errors import FormatError, UnknownTarget
from tpeft_deploy.exporters import export_bundle
from tpeft_deploy.exporters.folded import plan_folded
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.runtime import Runtime

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"input_ids": torch.arange(10).reshape(2, 5)}
IMAGES = {"pixel_values": torch.linspace(0, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
SOUNDS = {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16)}


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def t5_encoder(whole: Any) -> Any:
    encoder = T5EncoderModel(whole.config)
    encoder.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith(("shared", "encoder"))})
    return encoder


def whisper() -> Any:
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ids = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"], 0)
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=32,
            num_mel_bins=8,
            d_model=16,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=8,
            max_target_positions=8,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **layers,
            **ids,
        )
    )


def llava() -> Any:
    text = LlamaConfig(vocab_size=32, num_key_value_heads=2, use_cache=False, **SIZES)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **SIZES)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=31))


class Features(nn.Module):
    """A vision tower as LLaVA reads it: the states before the last layer."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return features


@dataclass(frozen=True)
class Part:
    """A part of a model: how to find it in the whole, and its prefix in an adapter of the whole."""

    whole: Callable[[], Any]
    find: Callable[[Any], Any]
    prefix: str
    inputs: dict[str, Tensor]
    targets: tuple[str, ...]


PARTS = {
    "t5": Part(t5, t5_encoder, "encoder", IDS, ("q", "wo")),
    "t5-stack": Part(t5, lambda whole: whole.encoder, "encoder", IDS, ("q", "wo")),
    "whisper": Part(whisper, lambda whole: whole.model.encoder, "model.encoder", SOUNDS, ("q_proj", "fc1")),
    "llava-text": Part(llava, lambda whole: whole.model.language_model, "model.language_model", IDS, ("q_proj",)),
    "llava-vision": Part(llava, lambda whole: whole.model.vision_tower, "model.vision_tower", IMAGES, ("q_proj",)),
}


@dataclass(frozen=True)
class Case:
    part: Part
    base: nn.Module
    path: Path
    expected: np.ndarray[Any, Any]
    features: np.ndarray[Any, Any]  # the states before the last layer

    def load(self, **options: Any) -> Adapter:
        return load_adapter(self.path, base=self.base, **options)


@torch.no_grad()
def trained(part: Part, path: Path, config: peft.PeftConfig | None = None) -> Case:
    """The whole model trained with PEFT and saved; the part without the adapter, and its answer with it."""
    torch.manual_seed(0)
    whole = part.whole().eval()
    base = copy.deepcopy(part.find(whole)).eval()
    config = config or peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(part.targets))
    wrapped = peft.get_peft_model(whole, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(str(path))
    module = wrapped.get_base_model()
    inner = module.encoder if part.find is t5_encoder else part.find(module)
    outputs = inner(**part.inputs, output_hidden_states=True)
    return Case(part, base, path, outputs[0].numpy(), outputs.hidden_states[-2].numpy())


def error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_read_as_the_whole_model_has_it(tmp_path: Path, name: str) -> None:
    case = trained(PARTS[name], tmp_path)
    with torch.no_grad():
        plain, got = (
            model(**case.part.inputs)[0] for model in (case.base, adapted(case.base, case.load(part=case.part.prefix)))
        )
    assert error(got.numpy(), case.expected) < 1e-5
    assert error(plain.numpy(), case.expected) > 1e-3


def test_a_part_answers_as_in_the_whole_model(tmp_path: Path) -> None:
    case = trained(PARTS["t5"], tmp_path / "adapter")
    adapter = case.load(part=case.part.prefix)
    bundle = export_bundle(case.base, {"task": adapter}, tmp_path / "bundle", example_inputs=case.part.inputs)
    runtime = Runtime(bundle.path, provider="cpu")
    inputs = {key: value.numpy() for key, value in case.part.inputs.items()}
    first = bundle.manifest.outputs[0].name
    assert error(runtime.run(inputs, task="task")[first], case.expected) < 1e-5
    assert error(runtime.run(inputs)[first], case.expected) > 1e-3
    left_out = bundle.manifest.left_out["task"]
    assert left_out == dict.fromkeys(left_out, f"not of part {case.part.prefix!r}")
    assert all(key.startswith("base_model.model.") and case.part.prefix + "." not in key for key in left_out)
    assert case.part.prefix in bundle.oracle("task")["reason"]
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_patterns_mean_the_names_of_the_whole_model(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.self_attn.q_proj"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={name: 3}, alpha_pattern={name: 5})
    case = trained(PARTS["llava-text"], tmp_path, config)
    scales = [delta.scale for delta in case.load(part="model.language_model").deltas.values()]
    assert scales == pytest.approx([5 / 3, 8 / 2])


def test_weights_that_no_output_depends_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = trained(PARTS["llava-vision"], tmp_path / "adapter")
    base, unread = Features(case.base), "tower.encoder.layers.1.self_attn.q_proj.weight"
    adapter = load_adapter(case.path, base=case.base, part="model.vision_tower")
    adapter = Adapter({f"tower.{name}": delta for name, delta in adapter.deltas.items()})
    options: dict[str, Any] = {"example_inputs": case.part.inputs}
    with pytest.raises(UnknownTarget, match=r"a weight that the forward pass uses.*--unused skip"):
        plan_folded(base, adapter, **options)
    assert len(plan_folded(base, adapter, unused="skip", **options)["targets"]) == 1
    bundle = export_bundle(base, {"task": adapter}, tmp_path / "bundle", unused="skip", **options)
    assert bundle.manifest.left_out == {"task": {unread: "no output of the base depends on it"}}
    assert unread in caplog.text
    assert [target.name for target in bundle.manifest.targets] == [unread.replace("layers.1", "layers.0")]
    features = Runtime(bundle.path, provider="cpu").run({"pixel_values": IMAGES["pixel_values"].numpy()}, task="task")
    assert error(features["output"], case.features) < 1e-5


def test_a_prefix_that_nothing_has(tmp_path: Path) -> None:
    case = trained(PARTS["llava-text"], tmp_path)
    with pytest.raises(FormatError, match=r"a part of it: model\.language_model, model\.vision_tower"):
        case.load(part="language_model")
    with pytest.raises(UnknownTarget, match="give the part's prefix"):
        case.load()


def whisper_encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return whisper().model.encoder.eval(), SOUNDS


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_line_cuts_and_scales(tmp_path: Path) -> None:
    case = trained(PARTS["whisper"], tmp_path / "a@1")
    base, cut = "tests.exporters.forms.test_parts:whisper_encoder", ("--part", "model.encoder")
    inspected = json.loads(call("inspect", case.path, *cut, "--json"))
    assert len(inspected["weights"]) == 4
    assert set(inspected["left_out"].values()) == {"not of part 'model.encoder'"}
    assert "not of part 'model.encoder'" in call("inspect", case.path, *cut)
    place = tmp_path / "bundle"
    tasks = [f"--adapter=full={case.path}", f"--adapter=half={case.path}@0.5"]
    exported = json.loads(call("export", "bundle", base, "--out", place, *tasks, *cut, "--json"))
    assert exported["left_out"].keys() == {"full", "half"}
    call("adapter", "add", place, f"again={case.path}@0.5", *cut)
    bundle = Bundle.open(place)
    assert bundle.digest("half") == bundle.digest("again") != bundle.digest("full")
    for name, delta in bundle.adapter("half").deltas.items():
        np.testing.assert_allclose(delta.dense(), bundle.adapter("full").deltas[name].dense() / 2)

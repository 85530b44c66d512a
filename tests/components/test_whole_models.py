"""Components run one after another against PEFT's forward of the whole model, one adapter file for all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.helpers.commands import call
from tests.helpers.exporters import files
from tpeft_deploy import Adapter, Bundle, export_bundle, load_adapter
from tpeft_deploy.exporters.oracle.compare import relative_error
from tpeft_deploy.training import TuckerConfig

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
LIMIT = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))


def mt5() -> Any:
    return transformers.MT5ForConditionalGeneration(transformers.MT5Config(**T5, decoder_start_token_id=0))


def bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))


def mbart() -> Any:
    return transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART))


def marian() -> Any:
    return transformers.MarianMTModel(transformers.MarianConfig(**BART))


def pegasus() -> Any:
    return transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**BART))


def clip() -> Any:
    text = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32, "eos_token_id": 39}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 2}, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**SIZES, vocab_size=40, max_position_embeddings=64)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    return transformers.LlavaForConditionalGeneration(config)


def sam() -> Any:
    vision = {**SIZES, "image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 8}
    vision |= {"num_hidden_layers": 2, "output_channels": 8, "num_pos_feats": 4}
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    mask = {"hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    return transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    )


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=40,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return transformers.WhisperForConditionalGeneration(config)


def trained(model: Any, path: Path, config: Any) -> tuple[Any, Path]:
    """The model, saved; and in PEFT with an adapter with random values, saved too."""
    torch.manual_seed(1)
    model.eval().save_pretrained(path / "base")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(path / "adapter")
    return wrapped.eval(), path / "adapter"


def exported(path: Path) -> tuple[Bundle, Adapter]:
    adapter = load_adapter(path / "adapter", base=str(path / "base"))
    return export_bundle(str(path / "base"), {"task": adapter}, path / "bundle", unused="skip"), adapter


def run(bundle: Bundle, component: str, **inputs: Any) -> np.ndarray:
    """The first output of a component's factored graph for the task."""
    part = bundle.components[component]
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    result: np.ndarray = files.session(part.path / "factored.onnx").run(None, feeds | part.native("task"))[0]
    return result


def check(bundle: Bundle, got: np.ndarray, expected: torch.Tensor) -> None:
    assert relative_error(got, expected.detach().numpy()) <= LIMIT
    for part in bundle.components.values():
        record = part.oracle("task")
        if "task" in part.manifest.oracles:
            assert record["oracle"].startswith("peft"), record["reason"]
            assert record["error"] <= LIMIT


def warned(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Names of the weights that warnings say are left out."""
    messages = [message for message in caplog.messages if message.startswith("leave out of task")]
    return set(re.findall(r"[\w.]+\.weight", " ".join(messages)))


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules="all-linear")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(bart, marks=pytest.mark.thorough),
        *(pytest.param(make, marks=pytest.mark.soak) for make in (t5, mt5, mbart, marian, pegasus)),
    ],
)
@torch.no_grad()
def test_an_encoder_and_a_decoder(tmp_path: Path, make: Any) -> None:
    model, _ = trained(make(), tmp_path, lora())
    bundle, adapter = exported(tmp_path)
    assert list(bundle.components) == ["encoder", "decoder"]
    sizes = [len(part.deltas) for view in bundle.components.values() if (part := view.part(adapter))]
    assert len(sizes) == 2
    assert sum(sizes) >= len(adapter.deltas)
    ids, target = torch.randint(3, 40, (3, 6)), torch.randint(3, 40, (3, 4))
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    states = run(bundle, "encoder", input_ids=ids, attention_mask=mask)
    logits = run(bundle, "decoder", decoder_input_ids=target, encoder_hidden_states=states, attention_mask=mask)
    check(bundle, logits, model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits)


@pytest.mark.soak
@torch.no_grad()
def test_two_towers(tmp_path: Path) -> None:
    model, _ = trained(clip(), tmp_path, lora())
    bundle, _ = exported(tmp_path)
    pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(0, 39, (3, 6))
    ids[:, -1] = 39
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    found = {
        "image": run(bundle, "image", pixel_values=pixels),
        "text": run(bundle, "text", input_ids=ids, attention_mask=mask),
    }
    for name, array in found.items():
        normalised = array / np.linalg.norm(array, axis=-1, keepdims=True)
        check(bundle, normalised, expected[f"{name}_embeds"])


@torch.no_grad()
def test_vision_and_language(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = trained(llava(), tmp_path, lora())
    given = ("--adapter", f"task={tmp_path / 'adapter'}", "--unused", "skip")
    result = call("export", "bundle", tmp_path / "base", "--out", tmp_path / "bundle", *given)
    assert result.exit_code == 0, result.stderr
    bundle, adapter = Bundle.open(tmp_path / "bundle"), load_adapter(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert list(bundle.components) == ["vision", "embedding", "language"]
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(0, 39, (2, 8))
    ids[:, 1:5] = 39
    mask = torch.ones_like(ids)
    embeddings = run(bundle, "embedding", input_ids=ids).copy()
    embeddings[:, 1:5] = run(bundle, "vision", pixel_values=pixels)
    logits = run(bundle, "language", inputs_embeds=embeddings, attention_mask=mask)
    check(bundle, logits, model(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits)
    stored = bundle.adapter("task")
    assert any("vision_tower" in name for name in stored.deltas)
    assert any("language_model" in n for n in stored.deltas)
    dropped = {name for name in adapter.deltas if name not in stored.deltas}
    assert dropped
    assert all("vision_tower" in name and "layers.1." in name for name in dropped)
    assert warned(caplog) == dropped
    caplog.clear()
    result = call("adapter", "add", bundle.path, f"other={tmp_path / 'adapter'}")
    assert result.exit_code == 0, result.stderr
    assert warned(caplog) == dropped
    assert list(Bundle.open(bundle.path).tasks) == ["other", "task"]
    feeds = bundle.factors("task")
    assert all(np.array_equal(feeds[name], array) for name, array in bundle.factors("other").items())


@pytest.mark.soak
@torch.no_grad()
def test_masks_of_points(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["qkv", "lin1", "q_proj", "v_proj"])
    model, _ = trained(sam(), tmp_path, config)
    bundle, _ = exported(tmp_path)
    assert list(bundle.components) == ["image", "mask"]
    pixels, points = torch.randn(2, 3, 32, 32), 32 * torch.rand(2, 3, 5, 2)
    labels = torch.randint(0, 2, (2, 3, 5))
    embeddings = run(bundle, "image", pixel_values=pixels)
    masks = run(bundle, "mask", image_embeddings=embeddings, input_points=points, input_labels=labels)
    check(bundle, masks, model(pixel_values=pixels, input_points=points, input_labels=labels).pred_masks)


@pytest.mark.soak
@torch.no_grad()
def test_a_convolutional_stem_with_tucker_changes(tmp_path: Path) -> None:
    config = TuckerConfig(ranks=2, target_modules=["conv1", "conv2", "q_proj", "fc1"])
    model, _ = trained(whisper(), tmp_path, config)
    bundle, adapter = exported(tmp_path)
    assert adapter.deltas["model.encoder.conv1.weight"].shape == (16, 8, 3)
    sound, target = torch.randn(3, 8, 20), torch.randint(1, 40, (3, 4))
    states = run(bundle, "encoder", input_features=sound)
    logits = run(bundle, "decoder", decoder_input_ids=target, encoder_hidden_states=states)
    expected = model.base_model.model(input_features=sound, decoder_input_ids=target)
    check(bundle, logits, expected.logits)


@pytest.mark.parametrize("make", [t5, clip])
def test_names_that_no_component_knows_are_refused(tmp_path: Path, make: Any) -> None:
    from tests.helpers import nets
    from tpeft_deploy.errors import UnknownTarget

    make().eval().save_pretrained(tmp_path / "base")
    odd = Adapter({"encoder.nowhere.weight": nets.delta((16, 16), (2, 2), 0)})
    with pytest.raises(UnknownTarget, match=r"'encoder.nowhere.weight'.*expected a weight of one of the components"):
        export_bundle(str(tmp_path / "base"), {"task": odd}, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()

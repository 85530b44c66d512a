"""Names of other tools for the layers of a UNet and a text encoder: diffusers' own loader is the oracle."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.helpers.formats.trained import adapted, distance, save
from tpeft_deploy.errors import FormatError, UnknownTarget
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.name_maps import other_names

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LAYOUTS: dict[str, dict[str, Any]] = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
    },
}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
LAYERS += ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"]
# diffusers' loader, not its conversion of whole models, takes the upsampler of a block without attention for one.
UPSAMPLERS = {"sd1": "up_blocks.1.upsamplers.0.conv", "sdxl": "upsamplers.0.conv"}
INPUTS = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 5, 8)}


@cache
def unet(layout: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        **LAYOUTS[layout],
    ).eval()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    inputs = {name: torch.rand(shape) for name, shape in INPUTS.items()}
    result: Tensor = model(**inputs).sample
    return result


def trained(model: nn.Module, layers: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """PEFT's tensors of a LoRA of rank 2 and alpha 1 on the layers, and what the model answers with it."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=1, target_modules=layers))
    randomise(wrapped)
    tensors = get_peft_model_state_dict(wrapped)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}, answer(wrapped.eval())


def kohya(tensors: dict[str, Tensor], prefix: str, alpha: float = 1) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, which = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()  # type: ignore[union-attr]
        name = f"{prefix}_{module.replace('.', '_')}"
        found[f"{name}.lora_{'down' if which == 'A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def in_sgm(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    modules = {name for name, _ in model.named_modules()}
    others = {next(iter(own)): other for other, own in other_names(modules).items() if "processor" not in other}
    return {
        re.sub(r"^(.*?)((?:\.lora_[AB])?\.(?:weight|bias))$", lambda match: others[match[1]] + match[2], key): tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_has_its_name_in_sgm(layout: str) -> None:
    """diffusers converts a whole model from these names back to its own, every weight to its place."""
    own = unet(layout).state_dict()
    file = {f"model.diffusion_model.{name}": value for name, value in in_sgm(unet(layout), own).items()}
    converted = convert_ldm_unet_checkpoint(file, dict(unet(layout).config))
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[name], own[name]) for name in own)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_kohya_and_sgm(tmp_path: Path, layout: str) -> None:
    """Files under both schemes; diffusers brings the second to the names that the first has."""
    model = unet(layout)
    tensors, expected = trained(model, [*LAYERS, UPSAMPLERS[layout]])
    plain, sgm = kohya(tensors, "lora_unet"), kohya(in_sgm(model, tensors), "lora_unet")
    assert not plain.keys() & sgm.keys()
    theirs = copy.deepcopy(model)
    own, alphas = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(dict(sgm), model.config))
    theirs.load_lora_adapter(own, network_alphas=alphas, prefix="unet")
    torch.testing.assert_close(answer(theirs), expected, rtol=1e-5, atol=1e-5)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 1)}
    for file in (plain, sgm):
        assert error(save(tmp_path / "a.safetensors", {**file, **text}), model, expected, part="lora_unet") < 1e-5
    with pytest.raises(UnknownTarget, match="The file has lora_te, lora_unet: give one as --part"):
        load_adapter(tmp_path / "a.safetensors", base=model)
    with pytest.raises(FormatError, match="a part of it: lora_te, lora_unet"):
        load_adapter(tmp_path / "a.safetensors", base=model, part="lora_te1")


def test_names_of_attention_processors(tmp_path: Path) -> None:
    """The names before diffusers 0.22, which its loader still takes."""
    model = unet("sd1")
    tensors, _ = trained(model, ["to_q", "to_out.0"])
    pairs = {".to_q.lora_": ".processor.to_q_lora.", ".to_out.0.lora_": ".processor.to_out_lora."}
    file = {}
    for key, tensor in tensors.items():
        name = next(key.replace(new, old) for new, old in pairs.items() if new in key)
        file[f"unet.{name.replace('.A.', '.down.').replace('.B.', '.up.')}"] = tensor
    theirs = copy.deepcopy(model)
    theirs.load_lora_adapter(dict(file), prefix="unet")
    path = save(tmp_path / "a.safetensors", file)
    assert error(path, model, answer(theirs)) < 1e-5
    assert error(path, model, answer(theirs), part="unet") < 1e-5


@pytest.mark.parametrize("scaled", [{}, {"alpha_pattern": {"attn2.to_q": 3.0}, "rank_pattern": {"attn2.to_q": 1}}])
def test_diffusers_directory(tmp_path: Path, scaled: dict[str, Any]) -> None:
    """What `save_lora_adapter` writes: alpha and ranks are in the header, for one model or for a pipeline's."""
    model = copy.deepcopy(unet("sd1"))
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["to_q", "conv1"], **scaled))
    randomise(model)
    model.save_lora_adapter(tmp_path)
    expected = answer(model)
    assert error(tmp_path, unet("sd1"), expected) < 1e-5
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
        tensors = {f"unet.{key}": opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    fields = {f"unet.{key}": value for key, value in fields.items()} | {"text_encoder.r": 8}
    tensors["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.ones(2, 1)
    save(file, tensors, {"lora_adapter_metadata": json.dumps(fields)})
    assert error(tmp_path, unet("sd1"), expected, part="unet") < 1e-5
    with pytest.raises(FormatError, match="those of text_encoder, unet"):
        load_adapter(tmp_path)


def text_encoder(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(CLIPTextConfig(vocab_size=64, bos_token_id=0, eos_token_id=1, projection_dim=8, **sizes)).eval()


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("start", ["", "text_model."])
def test_text_encoder_with_and_without_text_model(tmp_path: Path, kind: type[nn.Module], start: str) -> None:
    model = text_encoder(kind)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    randomise(wrapped)
    tensors = {
        start + key.removeprefix("base_model.model.").removeprefix("text_model."): tensor
        for key, tensor in get_peft_model_state_dict(wrapped).items()
    }
    ids = torch.arange(10).reshape(2, 5)
    image = {"lora_unet_conv_in.lora_up.weight": torch.ones(2, 1)}
    path = save(tmp_path / "a.safetensors", kohya(tensors, "lora_te", alpha=8) | image)
    adapter = load_adapter(path, base=model, part="lora_te")
    with torch.no_grad():
        got, expected = adapted(model, adapter)(ids)[0], wrapped.eval()(ids)[0]
    assert distance(got, expected) < 1e-5
    assert list(adapter.left_out) == ["lora_unet_conv_in.lora_up.weight"]


def error(path: Path, model: nn.Module, expected: Tensor, part: str | None = None) -> float:
    adapter = load_adapter(path, base=model, part=part)
    assert distance(answer(model), expected) > 1e-2
    return distance(answer(adapted(model, adapter)), expected)


def randomise(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)

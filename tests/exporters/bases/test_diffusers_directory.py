"""Models and directories of diffusers as bases: ONNX Runtime against diffusers with an adapter that is not merged."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tpeft_deploy import Adapter, Runtime, export_bundle, load_adapter
from tpeft_deploy.errors import MissingExtra, UnsupportedBase
from tpeft_deploy.exporters.bases import dotted_names
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Inputs
from tpeft_deploy.formats.base.model import open_model

_BLOCKS: dict[str, Any] = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
_JOINT: dict[str, Any] = {"num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10}
CONFIGS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        **_BLOCKS,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 6 * 2 + 10,
    },
    "AutoencoderKL": {
        **_BLOCKS,
        "latent_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "SD3Transformer2DModel": {
        **_JOINT,
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "attention_head_dim": 4,
        "caption_projection_dim": 8,
        "pos_embed_max_size": 12,
    },
    "FluxTransformer2DModel": {
        **_JOINT,
        "in_channels": 6,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    },
    "UNet2DModel": {
        **_BLOCKS,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "num_class_embeds": 5,
    },
}
QUICK = "FluxTransformer2DModel"  # the others take 10 s each
TARGETS = ["to_q", "to_out.0", "conv1", "proj_out", "linear_1"]


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**CONFIGS[name])
    with torch.no_grad():  # of no layer zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def trained(model: Any, seed: int, path: Path) -> tuple[nn.Module, Path]:
    """The model with an adapter of diffusers' own making, not merged, and the adapter as PEFT writes it."""
    tuned = deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS)
    if hasattr(tuned, "add_adapter"):
        tuned.add_adapter(config)
    else:  # UNet2DModel is no base of adapters in diffusers
        peft.inject_adapter_in_model(config, tuned)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    config.save_pretrained(str(path))
    tensors = {f"base_model.model.{name}": own for name, own in peft.get_peft_model_state_dict(tuned).items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return tuned.eval(), path


def outputs_of(model: nn.Module, inputs: Inputs) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = model(**dotted_names.nest({name: torch.from_numpy(array) for name, array in inputs.items()}))
    array: np.ndarray[Any, Any] = found.sample.numpy()
    return array


def at_other_sizes(inputs: Inputs) -> dict[str, Any]:
    """Three rows, twice as wide an image, and more tokens."""
    grown = {}
    for name, array in inputs.items():
        axes = {"sample": 3, "hidden_states": array.ndim - 1 if array.ndim == 4 else 1, "img_ids": 0}
        wide = np.concatenate([array, 0.5 * array], axes[name]).astype(array.dtype) if name in axes else array
        grown[name] = wide if name.endswith("_ids") and wide.shape[0] > 2 else wide[[0, 1, 1]]
    return grown


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_gives_inputs_of_rows_that_differ(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    positions = {"img_ids", "txt_ids"}
    assert all(
        len(array) == 2 and (array[0] != array[1]).any() for n, array in base.inputs.items() if n not in positions
    )
    assert isinstance(base, TorchBase)
    assert base.dynamic_shapes.keys() == base.inputs.keys()
    for inputs in (base.inputs, at_other_sizes(base.inputs)):
        assert np.array_equal(base.reference(None, inputs, ["sample"])["sample"], outputs_of(model, inputs))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name != QUICK else []) for name in CONFIGS]
)
@pytest.mark.thorough
def test_a_directory_with_adapters_is_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "base")
    tuned, read = dict[str, nn.Module](), dict[str, Adapter]()
    for seed, task in enumerate(("one", "two")):
        tuned[task], place = trained(model, seed, tmp_path / task)
        read[task] = load_adapter(place, base=open_model(str(tmp_path / "base")))
    bundle = export_bundle(str(tmp_path / "base"), read, tmp_path / "bundle", folded=True)
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    assert {record["oracle"] for record in bundle.manifest.oracles.values()} == {"peft 0.21.2"}
    (output,) = [port.name for port in bundle.manifest.outputs]
    assert output == ("sample_out" if "sample" in bundle.example() else "sample")
    runtime = Runtime(bundle.path, provider="cpu")
    try:
        for inputs in (bundle.example(), at_other_sizes(bundle.example())):
            wanted = {task: outputs_of(own, inputs) for task, own in {**tuned, "base": model}.items()}
            tasks = ["two", "base", "one"][: len(wanted["base"])]
            for task, right in wanted.items():
                assert compare.relative_error(runtime.run(inputs, task=task)[output], right) <= 1e-5
            mixed = runtime.run(inputs, tasks=tasks)[output]
            for row, task in enumerate(tasks):
                assert compare.relative_error(np.asarray(mixed[row]), wanted[task][row]) <= 1e-5
            session = compare.open_session(bundle.path / "folded" / "two.onnx")
            assert compare.relative_error(compare.run(session, inputs, {})[output], wanted["two"]) <= 1e-5
    finally:
        runtime.close()


def test_a_module_takes_a_dict_and_a_timestep_without_rows() -> None:
    model, pixels = made("UNet2DConditionModel"), torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    added = {"text_embeds": pixels[:, 0, 0, :2].repeat(1, 5), "time_ids": 100 * pixels[:, 1, 0, :6]}
    inputs = {
        "sample": pixels,
        "timestep": torch.tensor(700),
        "encoder_hidden_states": pixels[:, :, 1],
        "added_cond_kwargs": added,
    }
    base = load_base(model, example_inputs=inputs)
    assert base.inputs["timestep"].shape == ()
    assert list(base.inputs)[-2:] == ["added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"]
    expected = outputs_of(model, base.inputs)
    assert np.array_equal(base.reference(None, base.inputs, ["sample_out"])["sample_out"], expected)
    graph = base.graph().graph
    assert [value.name for value in graph.inputs] == list(base.inputs)
    assert [value.name for value in graph.outputs] == ["sample_out"]


def test_shards_and_16_bits_are_read(tmp_path: Path) -> None:
    made("UNet2DModel").half().save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    base = load_base(tmp_path)
    assert {array.dtype.name for array in base.weights.values()} == {"float16"}
    assert base.inputs["sample"].dtype == np.float16


def refused(path: Path) -> str:
    with pytest.raises(UnsupportedBase) as raised:
        load_base(path)
    return str(raised.value)


def test_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "XPipeline", "unet": ["diffusers", "U"]}))
    made("UNet2DModel").save_pretrained(tmp_path / "unet")
    assert (
        f"got a pipeline of diffusers (XPipeline). Give the folder of one of its models: {tmp_path}/unet."
        in refused(tmp_path)
    )


def test_what_is_incomplete_or_unknown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("UNet2DModel").save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    whole, tensors = json.loads(config.read_text()), load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, weights)
    assert "conv_in.bias" in refused(tmp_path)
    save_file(tensors, weights)

    def configured(other: Mapping[str, Any]) -> str:
        config.write_text(json.dumps({**whole, **other}))
        return refused(tmp_path)

    assert "_class_name 'UNet9D'" in configured({"_class_name": "UNet9D"})
    assert "quantised ones" in configured({"quantization_config": {"quant_method": "x"}})
    config.write_text(json.dumps(whole))
    weights.rename(tmp_path / "elsewhere.safetensors")
    assert "expected weights in diffusion_pytorch_model.safetensors" in refused(tmp_path)
    (tmp_path / "elsewhere.safetensors").rename(weights)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"tpeft-deploy\[diffusers\]"):
        load_base(tmp_path)


def test_a_class_without_example_inputs_asks_for_a_factory(tmp_path: Path) -> None:
    diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path)
    assert "expected one of AutoencoderKL, Flux" in (message := refused(tmp_path))
    assert "package.module:function" in message

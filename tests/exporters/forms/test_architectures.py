"""Real architectures, whole: every linear and conv adapted, in every form, at two shapes, mixed rows included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from tests.helpers import nets
from tests.helpers.exporters import architectures
from tests.helpers.exporters.architectures import Built
from tpeft_deploy import Adapter, Runtime, export_bundle
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle.subject import Subject

MODELS: dict[str, Callable[[], Built]] = {
    "ConvNeXt-V2": architectures.convnext,
    "ViT": architectures.vit,
    "DINOv2": architectures.dinov2,
    "BERT": architectures.bert,
    "DeBERTa-V2": architectures.deberta_v2,
    "DeBERTa-V3": architectures.deberta_v3,
    "Llama with KV cache": architectures.llama,
    "Llama, tied": architectures.llama_tied,
    "ResNet with BatchNorm": architectures.resnet,
    "MultiheadAttention encoder": architectures.attention_encoder,
    "Conv1d net": architectures.waves,
    "Conv3d net": architectures.volumes,
    "U-Net with cross-attention": architectures.unet,
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
HALF = ("ConvNeXt-V2", "ViT", "BERT", "ResNet with BatchNorm")


def adapters_for(module: nn.Module) -> dict[str, Adapter]:
    """Two adapters of every linear and conv, of other ranks."""
    names = [f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, LAYERS)]
    names = [name for name in names if name in dict(module.named_parameters())]  # a tied head has another name too
    names += ["model.embed_tokens.weight"] if "model.embed_tokens.weight" in dict(module.named_parameters()) else []
    names += [f"{name}.in_proj_weight" for name, m in module.named_modules() if isinstance(m, nn.MultiheadAttention)]
    weights = dict(module.named_parameters())
    made = {}
    for seed, rank in enumerate((3, 2), 1):
        ranks = {name: tuple(min(rank, size) for size in weights[name].shape) for name in names}
        made[f"rank{rank}"] = nets.adapter_for(module.float(), ranks, seed=seed)
    return made


def merged(module: nn.Module, adapter: Adapter | None, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    weights = dict(module.named_parameters(remove_duplicate=False))
    changed = {}
    for name, delta in adapter.deltas.items() if adapter is not None else ():
        changed[name] = (weights[name].detach().double() + torch.from_numpy(delta.dense())).to(weights[name].dtype)
    with torch.no_grad():
        outputs = functional_call(module, changed, (), inputs, tie_weights=False)
    return [leaf.float().numpy() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )


CASES = [pytest.param(name, torch.float32, id=f"{name}-float32") for name in MODELS]
# All of them in 16 bits take minutes: four here, the others behind `make soak`.
CASES += [
    pytest.param(name, torch.float16, id=f"{name}-float16", marks=[] if name in HALF else [pytest.mark.soak])
    for name in MODELS
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_real_architecture_in_every_form(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module, inputs, shapes = MODELS[name]()
    adapters = adapters_for(module)
    module = module.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    bundle = export_bundle(
        module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes, folded=True
    )
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    rounding = bundle.manifest.rounding
    assert (rounding is None) == (dtype == torch.float32)
    limit = 1e-5 if rounding is None else max(rounding.limits.values())
    if rounding is not None:
        assert rounding.limits == {name: max(2e-3, 4 * own) for name, own in rounding.measured.items()}
        assert limit < 1e-2
    assert {check["form"] for check in bundle.manifest.gate} >= {"base", "folded", "factored", "banked", "mixed rows"}
    base = load_base(module, example_inputs=inputs, dynamic_shapes=shapes)
    subject = Subject(base, base.graph().graph)
    sizes = subject.shapes
    assert len(sizes) == 2
    assert all(sizes[0][free] != sizes[1][free] for free in sizes[0])

    runtime = Runtime(bundle.path, provider="cpu")
    exact = module.float()
    tasks = ["rank2", "base", "rank3", "base", "rank2"]
    for free in sizes:
        batch = subject.inputs(free | {"batch": len(tasks)})
        wide = {key: torch.from_numpy(value) for key, value in batch.items()}
        wide = {key: value.float() if value.is_floating_point() else value for key, value in wide.items()}
        mixed = list(runtime.run(batch, tasks=tasks).values())
        for task in set(tasks):
            expected = merged(exact, adapters.get(task), wide)
            rows = [row for row, own in enumerate(tasks) if own == task]
            for got, wanted in zip(mixed, expected, strict=True):
                assert error(np.asarray(got)[rows], wanted[rows]) <= limit, task
            if task != "base":
                feeds = dict(batch)
                folded = session(bundle.path / "folded" / f"{task}.onnx").run(None, feeds)
                factored = session(bundle.path / "factored.onnx").run(None, feeds | bundle.factors(task))
                for one, other, wanted in zip(folded, factored, expected, strict=True):
                    assert max(error(one, wanted), error(other, wanted)) <= limit, task

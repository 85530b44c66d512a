"""Adapters, inputs, references and errors of the cases in `layers`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.func import functional_call

from tests.helpers import nets
from tests.helpers.exporters.layers import Case
from tpeft_deploy import Adapter

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3}


def merged(module: nn.Module, adapter: Adapter | None, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """The oracle, in float32 throughout: gain * (W + dW) as dense float64 arrays in place of the weights."""
    weights = module.state_dict()
    changed = {}
    for name in {*adapter.deltas, *adapter.gains} if adapter is not None else ():
        total = weights[name].double().numpy()
        total = total + adapter.deltas[name].dense() if name in adapter.deltas else total  # type: ignore[union-attr]
        total = total * adapter.gains[name] if name in adapter.gains else total  # type: ignore[union-attr]
        changed[name] = torch.from_numpy(total).to(weights[name].dtype)
    changed |= {name: torch.from_numpy(array) for name, array in (adapter.overrides.items() if adapter else ())}
    with torch.no_grad():
        output: torch.Tensor = functional_call(module, changed, (), inputs, tie_weights=False)
    return output.float().numpy()


def adapters_of(case: Case, module: nn.Module, change: str) -> dict[str, Adapter]:
    """Two adapters of other ranks and one that leaves half of the weights alone."""
    made = {}
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for seed, task in enumerate(("a", "b", "part")):
        random = np.random.default_rng(seed)
        targets = case.targets if change != "override" or not set(case.overrides) & set(case.targets) else {}
        names = list(targets)[: 1 if task == "part" else None]
        ranks = {name: tuple(max(1, rank - seed) for rank in targets[name]) for name in names}
        deltas = {n: nets.delta(weights[n].shape, r, seed + i) for i, (n, r) in enumerate(ranks.items())}
        gains, overrides = {}, {}
        if change.startswith("gain"):
            mode = int(change[-1])
            for name in (name for name, modes in case.gains.items() if mode in modes):
                shape = [size if axis == mode else 1 for axis, size in enumerate(weights[name].shape)]
                gains[name] = 1 + 0.3 * random.standard_normal(shape).astype(np.float32)
        if change == "override":
            for name in case.overrides[: 1 if task == "part" else None]:
                noise = np.abs(random.standard_normal(weights[name].shape)).astype(weights[name].dtype)
                overrides[name] = weights[name] + 0.3 * noise
        made[task] = Adapter(deltas, overrides, gains=gains, source=task)
    return made


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def resized(case: Case, inputs: dict[str, torch.Tensor], rows: int, more: int) -> dict[str, torch.Tensor]:
    """Other inputs, with `more` entries added along every axis that is free."""
    generator = torch.Generator().manual_seed(rows)
    batch = {}
    for name, tensor in inputs.items():
        free = case.free.get(name, {})
        shape = [rows, *(size + more * (axis in free) for axis, size in enumerate(tensor.shape[1:], 1))]
        whole = torch.randint(0, 9, shape, generator=generator)
        real = torch.randn(shape, generator=generator)
        batch[name] = real.to(tensor.dtype) if tensor.is_floating_point() else whole
    return batch


def feeds(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime 1.32 crashes in this pass on a transposed 16-bit product; see gate.open_session.
    disabled = ["NchwcTransformer"]
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def changes(case: Case) -> list[str]:
    modes = sorted({mode for modes in case.gains.values() for mode in modes})
    return ["delta", *(f"gain {mode}" for mode in modes), *(["override"] if case.overrides else [])]

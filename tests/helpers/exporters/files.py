"""Models exported to ONNX files by other means than ours, and what their folds and bundles compute against torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.exporters.oracle.quiet import quiet

EXPORTERS = ("raw", "optimised", "torchscript")
Inputs = Mapping[str, torch.Tensor]
Factory = Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]


class EqualNet(nn.Module):
    """Two linears of equal values, which exporters merge into one initializer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(torch.tanh(self.a(x)))
        return result


def equal_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    return EqualNet().eval(), {"x": torch.randn(2, 3, 8)}


class NormedNet(nn.Module):
    """A norm behind every kind of layer that an optimiser folds one into."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 6, 3, bias=False)
        self.line_norm = nn.BatchNorm1d(6)
        self.back = nn.ConvTranspose1d(6, 4, 3, groups=2)
        self.back_norm = nn.BatchNorm1d(4)
        self.flat = nn.Linear(4, 9)
        self.flat_norm = nn.BatchNorm1d(9)
        self.head = nn.Linear(9, 5)
        for norm in (self.line_norm, self.back_norm, self.flat_norm):
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.normal_(norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.line_norm(self.line(x)))
        x = torch.tanh(self.back_norm(self.back(x))).mean(2)
        result: torch.Tensor = self.head(torch.tanh(self.flat_norm(self.flat(x))))
        return result


def normed_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(6)
    return NormedNet().eval(), {"x": torch.randn(2, 3, 10)}


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(7)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


def export(module: nn.Module, inputs: Inputs, file: Path, exporter: str, opset: int | None = None) -> Path:
    """Write a model as one of `EXPORTERS` does, with a dynamic batch."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on what its own exporters do
        if exporter == "torchscript":
            axes = {name: {0: "batch"} for name in inputs}
            torch.onnx.export(
                module,
                (),
                file,
                kwargs=dict(inputs),
                dynamo=False,
                input_names=list(inputs),
                dynamic_axes=axes,
                opset_version=opset or 17,
            )
            return file
        program = torch.onnx.export(
            module,
            (),
            kwargs=dict(inputs),
            dynamo=True,
            optimize=exporter == "optimised",
            dynamic_shapes={name: {0: "batch"} for name in inputs},
            opset_version=opset or 20,
            verbose=False,
        )
    assert program is not None
    program.save(file)
    return file


_WRITTEN: dict[tuple[str, str], bytes] = {}


def written(factory: Factory, place: Path, exporter: str) -> Path:
    """A factory's model as a file of one's own; each is exported once."""
    key, file = (factory.__name__, exporter), place / "base.onnx"
    if key not in _WRITTEN:
        _WRITTEN[key] = export(*factory(), file, exporter).read_bytes()
    file.write_bytes(_WRITTEN[key])
    return file


def merged(module: nn.Module, adapter: Adapter | None, inputs: Inputs) -> list[np.ndarray]:
    """The independent oracle: the torch module with gain * (W + dW), in float64, and the overrides for its own."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    changed: dict[str, torch.Tensor] = {}
    for name in [*adapter.deltas, *adapter.gains] if adapter is not None else []:
        assert adapter is not None
        total = weights[name].detach().double()
        if name in adapter.deltas:
            total = total + torch.from_numpy(adapter.deltas[name].dense())
        if name in adapter.gains:
            total = total * torch.from_numpy(adapter.gains[name].astype(np.float64))
        changed[name] = total.to(weights[name].dtype)
    if adapter is not None:
        changed |= {name: torch.from_numpy(array) for name, array in adapter.overrides.items()}
    with torch.no_grad():
        outputs = functional_call(module, changed, (), dict(inputs), tie_weights=False)
    return [leaf.numpy() for leaf in tree_leaves(outputs)]


def arrays(inputs: Inputs) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert [array.shape for array in got] == [array.shape for array in expected]
    pairs = zip(got, expected, strict=True)
    return max(float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(b))) for a, b in pairs)


def worst_error(bundle: Bundle, module: nn.Module, adapters: Mapping[str, Adapter], inputs: Inputs) -> float:
    """Of the folded, factored and banked forms and of a batch of mixed rows, against the torch module.

    Args:
        bundle: exported with folded=True.
        module: in float32.
        adapters: task -> adapter; of those that keep the heads' sizes.
        inputs: as the bundle takes them, two rows.
    """
    batch = {name: torch.cat([tensor, tensor.flip(-1), tensor.roll(1, -1)])[:5] for name, tensor in inputs.items()}
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    runtime = Runtime(bundle.path, provider="cpu")
    assert bundle.manifest.rows == "each"
    names = [port.name for port in bundle.manifest.outputs]
    order = [*adapters, "base", *adapters, "base", *adapters][:5]
    mixed = runtime.run(arrays(batch), tasks=order)
    errors = []
    for row, task in enumerate(order):
        expected = merged(module, adapters.get(task), {name: tensor[row : row + 1] for name, tensor in exact.items()})
        errors.append(error([np.asarray(mixed[name][row])[None] for name in names], expected))
    factored = session(bundle.path / "factored.onnx")
    for task, adapter in adapters.items():
        expected = merged(module, adapter, exact)
        banked = runtime.run(arrays(batch), task=task)
        errors.append(error([banked[name] for name in names], expected))
        errors.append(error(factored.run(None, arrays(batch) | bundle.factors(task)), expected))
        folded = session(bundle.path / "folded" / f"{task}.onnx").run(None, arrays(batch))
        errors.append(error(folded, expected))
    return max(errors)

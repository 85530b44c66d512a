"""What exporting costs, what a bundle weighs, and what its forms cost to run, on two real architectures.

    python benchmarks/export.py [--model vit|convnext] [--repeats N] [--json]

ViT-base and ConvNeXtV2-tiny (random weights, 224 pixels), adapters of rank 8 on every linear and conv.  Times of
exporting are shares of one base export in the same process; costs of running are ratios of medians over interleaved
runs of one row, two threads that do not spin, the least of the processes' neighbours' noise being one's own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from tpeft_deploy import Adapter, Bundle, TuckerDelta, export_bundle
from tpeft_deploy.bundle import slots
from tpeft_deploy.exporters import folded
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.branches import BLOCKED_BRANCHES, attach_banked, attach_factored
from tpeft_deploy.exporters.branches.blocked import can_block
from tpeft_deploy.exporters.graph import batch_axes
from tpeft_deploy.exporters.graph.resolve import resolve
from tpeft_deploy.exporters.graph.weights_and_shapes import clean_up, complete_shapes, prepare
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.targets import activations, plan
from tpeft_deploy.tucker import Array

RANK = 8
LAYERS = (nn.Linear, nn.Conv2d)
Clock = Callable[[], float]


class Logits(nn.Module):
    """A classifier of transformers as a function of pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values).logits
        return logits


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig())).eval()


def convnext() -> nn.Module:
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768], image_size=224)
    return Logits(ConvNextV2ForImageClassification(config)).eval()


MODELS = {"vit": vit, "convnext": convnext}


def is_layer(name: str, layer: nn.Module) -> bool:
    del name
    return isinstance(layer, LAYERS)


def adapter_for(
    module: nn.Module, seed: int, rank: int = RANK, chosen: Callable[[str, nn.Module], bool] = is_layer
) -> Adapter:
    """An adapter of a rank in channels, with whole kernels, on the chosen linears and convs; all by default."""
    random = np.random.default_rng(seed)
    deltas = {}
    for name, layer in module.named_modules():
        if not (isinstance(layer, LAYERS) and chosen(name, layer)):
            continue
        shape = tuple(layer.weight.shape)
        ranks = tuple(min(rank, size) for size in shape[:2]) + shape[2:]
        factors = tuple(
            random.standard_normal((size, rank)).astype(np.float32) if size != rank else None
            for size, rank in zip(shape, ranks, strict=True)
        )
        delta = TuckerDelta(random.standard_normal(ranks).astype(np.float32), factors)
        deltas[f"{name}.weight"] = TuckerDelta(delta.core, factors, 0.1 / delta.norm())
    return Adapter(deltas, source=f"adapter {seed}")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def exporting(name: str, place: Path) -> dict[str, float]:
    """Seconds of the base export, and everything else as a share of it."""
    torch.manual_seed(0)
    module = MODELS[name]()
    base = load_base(module, example_inputs={"pixel_values": torch.randn(2, 3, 224, 224)})
    adapter = adapter_for(module, 0)
    base.graph()  # the exporter's own first call imports half of torch
    seconds, raw = timed(base.graph)
    complete_shapes(raw.graph)
    held = resolve(raw.graph, base.weights, base.aliases)
    optimising, raw = timed(partial(prepare, raw, held.values()))
    targets = plan(raw.graph, {"a": adapter}, held, base=name)
    orders = batch_axes.find(Subject(base, raw.graph), raw, activations(raw.graph, targets).items(), place)

    def attach(form: str, branches: Any = None) -> None:
        model = raw.clone()
        chosen = {} if branches is None else {"branches": branches}
        if form == "factored":
            attach_factored.attach(model, targets, **chosen)
        else:
            attach_banked.attach(model, targets, orders, **chosen)
        clean_up(model)

    results = {"base export, s": seconds, "optimise once": optimising / seconds}
    for form in ("factored", "banked"):
        results[f"{form}: attach"] = timed(partial(attach, form))[0] / seconds
    if can_block(raw.graph, targets):
        results["factored.cpu: attach"] = timed(partial(attach, "factored", BLOCKED_BRANCHES))[0] / seconds

    def fold() -> None:
        ir.save(folded.fold(base, raw, adapter, task="a"), place / "folded.onnx", external_data="folded.data")

    results["fold one task"] = timed(fold)[0] / seconds
    whole, bundle = timed(lambda: export_bundle(base, {"a": adapter}, place / "bundle"))
    results["whole export with its proof"] = whole / seconds
    other = adapter_for(module, 1)
    results["add a task"] = timed(lambda: bundle.add("b", other))[0] / seconds
    results["bytes of a task / bytes of its core and factors"] = task_bytes(bundle, "b") / other.nbytes
    results["bytes of a task / bytes of core, factors and slots"] = task_bytes(bundle, "b") / factor_bytes(
        bundle, other
    )
    shared = sum((bundle.path / file).stat().st_size for file in bundle.manifest.files)
    weights = sum(weight.length for weight in bundle.manifest.weights.values())
    results["bytes of the bundle without tasks / bytes of the weights"] = shared / weights
    return results


def task_bytes(bundle: Bundle, task: str) -> int:
    return sum(file.stat().st_size for file in (bundle.path / "adapters" / task).rglob("*") if file.is_file())


def factor_bytes(bundle: Bundle, adapter: Adapter) -> int:
    """Core and factors as trained, and the slots that the graphs take: a bundle has a file of each."""
    return adapter.nbytes + sum(array.nbytes for array in bundle.feeds(adapter).values())


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def prepared(bundle: Bundle, file: str, pixels: Array) -> Callable[[], None]:
    """A run with everything bound beforehand; banks hold the base and two tasks."""
    opened = session(bundle.path / file)
    binding = opened.io_binding()
    feeds: dict[str, Array] = {"pixel_values": pixels}
    if file.startswith("factored"):
        feeds |= bundle.factors("a")
    if file.startswith("banked"):
        filled = [{}, bundle.fill(bundle.adapter("a")), bundle.fill(bundle.adapter("b"))]
        for target in bundle.manifest.targets:
            default = bundle.default(target)
            for slot in slots.slots_of(target):
                stacked = slots.stack([own.get(target.key, default)[slot.name] for own in filled])
                feeds[slots.input_name(target, slot.name)] = stacked
        feeds[slots.INDEX] = np.array([1])
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
    for output in opened.get_outputs():
        binding.bind_output(output.name)
    return lambda: opened.run_with_iobinding(binding)


def running(bundle: Bundle, repeats: int, clock: Clock) -> dict[str, float]:
    """Medians of one row, as ratios."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    files = [file for file in bundle.manifest.files if file.endswith(".onnx")]
    runs = {file.removesuffix(".onnx"): prepared(bundle, file, pixels) for file in files}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if repeat >= 2:
                times[name].append(clock() - start)
    # Ratios within one round: what disturbs a machine disturbs neighbours alike.
    ratio = {
        name: statistics.median(a / b for a, b in zip(own, times["base"], strict=True)) for name, own in times.items()
    }
    results = {"base, ms": 1e3 * statistics.median(times["base"])}
    results |= {f"{name} / base": value for name, value in ratio.items() if name != "base"}
    for kind in ("", ".cpu"):
        if f"banked{kind}" in times:
            pairs = zip(times[f"banked{kind}"], times[f"factored{kind}"], strict=True)
            results[f"banked{kind} / factored{kind}"] = statistics.median(a / b for a, b in pairs)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="Processor time instead of the wall clock.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    document: dict[str, dict[str, float]] = {}
    for name in [options.model] if options.model else sorted(MODELS):
        with tempfile.TemporaryDirectory() as place:
            document[name] = exporting(name, Path(place))
            clock = time.process_time if options.cpu_time else time.perf_counter
            document[name] |= running(Bundle.open(Path(place) / "bundle"), options.repeats, clock)
        document[name]["peak resident memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if options.json:
        print(json.dumps(document, indent=1))
        return
    for name, results in document.items():
        print(name)
        for what, value in results.items():
            print(f"  {what:<60} {value:10.3f}")


if __name__ == "__main__":
    main()

"""What folded sessions cost on the CPU: memory that is theirs alone, time to open, and time per run.

    python -m benchmarks.folded_memory [--model encoder|convnet] [--width N] [--layers N] [--sessions N] [--json]

Every way of folding has a process of its own.  Memory is what the second and further sessions add, from
/proc/self/smaps_rollup: anonymous pages, which cannot leave, and pages of files, which are shared or can.
Run times are medians of processor time, interleaved with a session of the base in the same process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from tpeft_deploy import Bundle
from tpeft_deploy.runtime.folding import merge
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.runtime.sessions.providers import choose

Run = Callable[[dict[str, np.ndarray]], object]
RUNS = 60


def make(model: str, width: int, layers: int, place: Path) -> None:
    """A bundle whose adapters change the queries and values of an encoder, or all convs of a second stage."""
    import torch
    import transformers
    from torch import nn

    from tests.helpers import nets
    from tests.helpers.exporters.architectures import randomise
    from tpeft_deploy import export_bundle

    torch.set_num_threads(1)
    if model == "encoder":
        config = transformers.BertConfig(
            vocab_size=20_000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=4 * width,
        )
        module: nn.Module = randomise(transformers.BertForSequenceClassification(config))
        ids = torch.randint(3, 40, (2, 7))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
        names = [name for name, _ in module.named_parameters() if name.endswith(("query.weight", "value.weight"))]
    else:
        sizes = [width // 4, width // 2, width, width]
        stages = transformers.ResNetConfig(
            embedding_size=sizes[0], hidden_sizes=sizes, depths=[1, layers, layers, 1], layer_type="basic"
        )
        module = randomise(transformers.ResNetForImageClassification(stages))
        inputs = {"pixel_values": torch.randn(2, 3, 96, 96)}
        shapes = {"pixel_values": {0: "batch"}}
        names = [n for n, p in module.named_parameters() if "stages.1" in n and p.ndim == 4]
    weights = dict(module.named_parameters())
    ranks = {name: tuple(min(8, size) for size in weights[name].shape) for name in names}
    adapters = {f"task{seed}": nets.adapter_for(module, ranks, seed=seed) for seed in range(3)}
    export_bundle(module, adapters, place, example_inputs=inputs, dynamic_shapes=shapes)


def options() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    made.intra_op_num_threads = 1
    return made


def session(file: Path, made: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(file), made, providers=["CPUExecutionProvider"])


def folded(bundle: Bundle, task: str, made: onnxruntime.SessionOptions) -> tuple[Run, object]:
    """A fold without `Plain`, for options that it does not have."""
    arrays = merge.weights(bundle, bundle.adapter(task))
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    made.add_external_initializers(list(arrays), values)
    opened = session(bundle.path / "base.onnx", made)
    return partial(opened.run, None), (arrays, values)


def each(bundle: Bundle, task: str, number: int, place: Path) -> tuple[Run, object]:
    """As it is: every session packs all weights."""
    plain = merge.fold(bundle, bundle.adapter(task), SessionFactory.of(bundle.manifest, choose("cpu"), threads=1))
    return plain.run, plain


def unpacked(bundle: Bundle, task: str, number: int, place: Path) -> tuple[Run, object]:
    made = options()
    made.add_session_config_entry("session.disable_prepacking", "1")
    return folded(bundle, task, made)


def shared(bundle: Bundle, task: str, number: int, place: Path) -> tuple[Run, object]:
    """On one packed copy of what no task changes."""
    plain = merge.fold(
        bundle, bundle.adapter(task), SessionFactory.of(bundle.manifest, choose("cpu"), threads=1), place=place
    )
    return plain.run, plain


def saved(bundle: Bundle, task: str, number: int, place: Path) -> tuple[Run, object]:
    """Every fold from a packed file of its own, written before."""
    opened = session(place / f"{number}.onnx", options())
    return partial(opened.run, None), opened


def prepare(way: str, bundle: Bundle, tasks: list[str], place: Path) -> None:
    """Write files before anything is measured, in a process of its own."""
    if way == "one packed copy":
        shared(bundle, tasks[0], 0, place)
    for number, task in enumerate(tasks if way == "a packed file each" else ()):
        made = options()
        made.optimized_model_filepath = str(place / f"{number}.onnx")
        made.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        made.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{number}.data")
        made.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        folded(bundle, task, made)


WAYS = {
    "each packs for itself": each,
    "without packing": unpacked,
    "one packed copy": shared,
    "a packed file each": saved,
}


def memory() -> tuple[float, float]:
    """Anonymous megabytes, and megabytes of files, of which those mapped several times count once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(rest.split()[0]) / 1e3 for name, rest in (line.split(":") for line in lines)}
    return found["Anonymous"], found["Pss"] - found["Anonymous"]


def measure(way: str, path: Path, tasks: list[str], place: Path) -> dict[str, float]:
    bundle = Bundle.open(path)
    inputs = bundle.example()
    held: list[object] = []
    opening, anonymous, mapped = [], [], []
    run: Run | None = None
    for number, task in enumerate(tasks):
        before, start = memory(), time.process_time()
        run, own = WAYS[way](bundle, task, number, place)
        run(inputs)
        opening.append(time.process_time() - start)
        held.append((run, own))
        after = memory()
        anonymous.append(after[0] - before[0])
        mapped.append(after[1] - before[1])
    assert run is not None
    run_base = Plain(path / "base.onnx", SessionFactory(choose("cpu"), threads=1)).run
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for call, spent in zip((run_base, run), times, strict=True):
            start = time.thread_time()
            call(inputs)
            spent.append(time.thread_time() - start)
    return {
        "anonymous, MB": statistics.median(anonymous[1:]),
        "files, MB": statistics.median(mapped[1:]),
        "open, ms": 1e3 * statistics.median(opening[1:]),
        "run / base": statistics.median(times[1]) / statistics.median(times[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=["encoder", "convnet"], default="encoder")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sessions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as one,
    ):
        path = Path(folder) / "bundle"
        one.apply(make, (arguments.model, arguments.width, arguments.layers, path))
        bundle = Bundle.open(path)
        tasks = [f"task{number % 3}" for number in range(arguments.sessions)]
        changed = merge.weights(bundle, bundle.adapter("task0"))
        result: dict[str, object] = {
            "weights, MB": sum(weight.length for weight in bundle.manifest.weights.values()) / 1e6,
            "changed, MB": sum(array.nbytes for array in changed.values()) / 1e6,
        }
        for way in WAYS:
            place = Path(folder) / way
            place.mkdir()
            one.apply(prepare, (way, bundle, tasks, place))
            result[way] = one.apply(measure, (way, path, tasks, place))
    if arguments.json:
        print(json.dumps(result))
        return
    for what, value in result.items():
        shown = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{what:24}" + "".join(f"{name} {number:8.2f}   " for name, number in shown))


if __name__ == "__main__":
    main()

"""What the runtime costs: rows of several tasks, switching, loading from disk, and runs while others load.

    python -m benchmarks.runtime --cache DIRECTORY [--threads N] [--seconds S] [--only PART] [--known 10,300] [--json]

| part | model | what |
|---|---|---|
| encoder | BERT, 6 layers of 384, rank 8 on every linear | 16 rows of 8 tokens: plain, base, one task, mixed, singles |
| known | the same | a switched run against a repeated one, by the number of adapters in the bundle |
| cold | ViT-base (86 M weights) of 32 pixels, rank 8 on every linear | an adapter from disk, in parts |
| directory | as encoder | `Runtime.load` of the PEFT directory of an adapter |
| loading | the ViT | the time of runs of one task while 100 adapters load, against without |

Cases take turns in one process, each with its weights in the cache (`runtime.bench.measure`); ratios are medians of
the ratios within a round.  Exported bundles are kept in the cache directory.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from benchmarks.export import Logits, adapter_for
from tpeft_deploy import Bundle, Runtime, export_bundle
from tpeft_deploy.formats.write import peft_lora
from tpeft_deploy.runtime.bench.measure import Case, interleave, spread
from tpeft_deploy.tucker import Array

ROWS, TOKENS, WORDS, RANK = 16, 8, 1000, 8
TASKS = [f"task-{number}" for number in range(8)]
MIXED = TASKS[:4]
PIXELS = 32
LOADS = 100
Figures = dict[str, float]


class Encoder(nn.Module):
    """A text classifier of transformers as a function of ids and mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def encoder() -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    )
    inputs = {
        "input_ids": torch.randint(0, WORDS, (2, TOKENS)),
        "attention_mask": torch.ones(2, TOKENS, dtype=torch.int64),
    }
    free = {name: {0: "batch", 1: "length"} for name in inputs}
    return Encoder(BertForSequenceClassification(config)).eval(), inputs, free


def vit() -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    from transformers import ViTConfig, ViTForImageClassification

    # Few pixels, so that there are many runs to take the 99th percentile of; the adapted weights are ViT-base's.
    module = Logits(ViTForImageClassification(ViTConfig(image_size=PIXELS))).eval()
    return module, {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS)}, {"pixel_values": {0: "batch"}}


def cached(place: Path, name: str, tasks: Sequence[str]) -> Bundle:
    """The bundle of a model, exported when it is not there."""
    if not (place / name / "manifest.json").is_file():
        torch.manual_seed(0)
        module, inputs, free = {"encoder": encoder, "vit": vit}[name]()
        adapters = {task: adapter_for(module, seed) for seed, task in enumerate(tasks)}
        export_bundle(
            module, adapters, place / name, name=name, max_rank=RANK, example_inputs=inputs, dynamic_shapes=free
        )
    return Bundle.open(place / name)


def knowing(bundle: Bundle, count: int, place: Path) -> Path:
    """A copy of the bundle that knows so many tasks, the further ones under other names; files are hard links."""
    tasks = list(bundle.tasks)
    path = place / f"{bundle.path.name}-{count}"
    if path.is_dir():
        return path
    new = path.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(bundle.path, new, copy_function=os.link, ignore=shutil.ignore_patterns("adapters"))
    for number, task in zip(range(count), cycle(tasks), strict=False):
        name = task if number < len(tasks) else f"alias-{number}"
        shutil.copytree(bundle.path / "adapters" / task, new / "adapters" / name, copy_function=os.link)
    return new.rename(path)


def texts(rows: int) -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(0, WORDS, (rows, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones((rows, TOKENS), np.int64)}


def turns(runtime: Runtime, tasks: Sequence[str], inputs: Mapping[str, Array]) -> Case:
    turn = cycle(tasks)
    return lambda: runtime.run(inputs, next(turn))


def ratio(times: Mapping[str, list[float]], case: str, to: str) -> Figures:
    found = spread([a / b for a, b in zip(times[case], times[to], strict=True)])
    return {f"{case} / {to}": found.median, f"{case} / {to}, quartiles apart": found.high - found.low}


def as_by_default(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a session as a user of ONNX Runtime does, but for threads that spin against those of other sessions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure_encoder(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "encoder", TASKS)
    runtime = Runtime(bundle.path, provider="cpu", threads=options.threads)
    plain = as_by_default(bundle.path / "base.onnx", options.threads)
    inputs = texts(ROWS)
    mixed = [task for task, _ in zip(cycle(MIXED), range(ROWS), strict=False)]
    single = [{name: array[row : row + 1] for name, array in inputs.items()} for row in range(ROWS)]
    hot = TASKS[-1]
    runtime.pin(hot, folded=True)
    cases: dict[str, Case] = {
        "plain": lambda: plain.run(None, inputs),
        "folded": lambda: runtime.run(inputs, hot),
        "base": lambda: runtime.run(inputs),
        "repeated": lambda: runtime.run(inputs, TASKS[0]),
        "switched": turns(runtime, TASKS[:-1], inputs),
        "mixed": lambda: runtime.run(inputs, tasks=mixed),
        "singles": lambda: [runtime.run(row, task) for row, task in zip(single, mixed, strict=True)],
        "plain singles": lambda: [plain.run(None, row) for row in single],
    }
    times = interleave(cases, options.seconds)
    pairs = [("base", "plain"), ("folded", "plain"), ("repeated", "plain"), ("mixed", "plain"), ("singles", "mixed")]
    pairs += [("plain singles", "plain"), ("switched", "repeated")]
    figures = {"plain, ms": 1e3 * spread(times["plain"]).median, "rounds": float(len(times["plain"]))}
    for case, to in pairs:
        figures |= ratio(times, case, to)
    return figures


def measure_known(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "encoder", TASKS)
    inputs = texts(1)
    figures: Figures = {}
    for count in options.known:
        known = knowing(bundle, count, options.cache)
        started = time.perf_counter()
        runtime = Runtime(known, provider="cpu", threads=options.threads, preload=False)
        figures[f"{count} known: opened, s"] = time.perf_counter() - started
        runs = {"repeated": turns(runtime, TASKS[:1], inputs), "switched": turns(runtime, TASKS, inputs)}
        times = interleave(runs, options.seconds / len(options.known))
        more = spread([1e6 * (b - a) for a, b in zip(times["repeated"], times["switched"], strict=True)])
        figures[f"{count} known: repeated, ms"] = 1e3 * spread(times["repeated"]).median
        figures |= {f"{count} known: {name}": value for name, value in ratio(times, "switched", "repeated").items()}
        figures[f"{count} known: switched - repeated, us"] = more.median
        runtime.close()
    return figures


def measure_cold(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "vit", TASKS[:2])
    cold = TASKS[1]
    adapter = bundle.adapter(cold)
    pixels = {"pixel_values": np.zeros((1, 3, PIXELS, PIXELS), np.float32)}
    runtime = Runtime(bundle.path, provider="cpu", threads=options.threads)

    def load() -> None:
        runtime.unload(cold)
        runtime.load(cold)

    def load_and_run() -> None:
        load()
        runtime.run(pixels, cold)

    cases: dict[str, Case] = {
        "read and check digests": lambda: bundle.adapter(cold),
        "contract to slots": lambda: bundle.fill(adapter),
        "load from the bundle": load,
        "load from the bundle and run": load_and_run,
        "run": lambda: runtime.run(pixels, TASKS[0]),
    }
    times = interleave(cases, options.seconds)
    runtime.close()
    figures = {"bytes of the adapter, MB": adapter.nbytes / 1e6}
    for case, own in times.items():
        figures[f"{case}, ms"] = 1e3 * spread(own).median
        figures[f"{case}, third quartile, ms"] = 1e3 * spread(own).high
    return figures


def measure_directory(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "encoder", TASKS)
    numbers = itertools.count()
    with (
        tempfile.TemporaryDirectory() as place,
        Runtime(bundle.path, provider="cpu", threads=options.threads, preload=False) as runtime,
    ):
        peft_lora.write(bundle.adapter(TASKS[0]), Path(place))
        # A name for each, as for adapters that come one after the other; rows of the bank are new.
        times = interleave({"load": lambda: runtime.load(f"new-{next(numbers)}", place)}, options.seconds)
    found = spread(times["load"])
    return {
        "weights of the adapter": float(len(bundle.adapter(TASKS[0]).deltas)),
        "load, ms": 1e3 * found.median,
        "load, quartiles apart, ms": 1e3 * (found.high - found.low),
    }


LOADER = """
import sys
from tpeft_deploy import Runtime
path, *tasks = sys.argv[1:]
runtime = Runtime(path, provider="cpu", threads=1, preload=False)
print("loading", flush=True)
while True:
    for task in tasks:
        runtime.load(task)
    for task in tasks:
        runtime.unload(task)
"""


def measure_loading(options: argparse.Namespace) -> Figures:
    """Runs of one task: alone, while 100 adapters load, and while another process loads the same 100 for itself.

    The last is what the machine's second processor costs the first; only what exceeds it is the runtime's doing.
    """
    bundle = cached(options.cache, "vit", TASKS[:2])
    known = knowing(bundle, LOADS + 2, options.cache)
    pixels = {"pixel_values": np.zeros((1, 3, PIXELS, PIXELS), np.float32)}
    runtime = Runtime(known, provider="cpu", threads=options.threads, preload=False)
    coming = [task for task in runtime.tasks if task not in TASKS]
    times: dict[str, list[float]] = {"alone": [], "others load": [], "another process loads": []}
    loads: list[float] = []

    def run_while(case: str, going_on: Callable[[], bool]) -> None:
        while going_on():
            start = time.perf_counter()
            runtime.run(pixels, TASKS[0])
            times[case].append(time.perf_counter() - start)

    def load_all() -> None:
        started = time.perf_counter()
        for task in coming:
            runtime.load(task)
        loads.append((time.perf_counter() - started) / len(coming))

    for _ in range(20):
        runtime.run(pixels, TASKS[0])
    gc.collect()
    gc.freeze()  # torch's objects, which no process that serves has
    end = time.perf_counter() + options.seconds
    while not loads or time.perf_counter() < end:
        loader = threading.Thread(target=load_all)
        loader.start()
        run_while("others load", loader.is_alive)
        for task in coming:
            runtime.unload(task)
        for case in ("alone", "another process loads"):
            with _loading_elsewhere(known, coming) if case != "alone" else nullcontext():
                until = time.perf_counter() + loads[-1] * len(coming)
                run_while(case, lambda until=until: time.perf_counter() < until)  # type: ignore[misc]
    runtime.close()
    figures: Figures = {"runs of each": float(min(map(len, times.values()))), "processors": float(os.cpu_count() or 0)}
    figures["an adapter loaded beside runs, ms"] = 1e3 * spread(loads).median
    for name, share in (("median", 0.5), ("p99", 0.99)):
        own = {case: float(np.quantile(found, share)) for case, found in times.items()}
        figures |= {f"{name}, {case}, ms": 1e3 * value for case, value in own.items()}
        figures[f"{name}, others load / alone"] = own["others load"] / own["alone"]
        figures[f"{name}, others load / another process loads"] = own["others load"] / own["another process loads"]
    return figures


@contextmanager
def _loading_elsewhere(bundle: Path, tasks: Sequence[str]) -> Iterator[None]:
    command = [sys.executable, "-c", LOADER, str(bundle), *tasks]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "encoder": measure_encoder,
    "known": measure_known,
    "cold": measure_cold,
    "directory": measure_directory,
    "loading": measure_loading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="Where exported bundles are kept.")
    parser.add_argument("--threads", type=int, default=1, help="Of each session.")
    parser.add_argument("--seconds", type=float, default=30.0, help="For each part, about.")
    parser.add_argument("--only", choices=sorted(PARTS), action="append")
    parser.add_argument(
        "--known", type=lambda text: [int(count) for count in text.split(",")], default=[10, 300, 10_000]
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    document = {name: PARTS[name](options) for name in options.only or PARTS}
    if options.json:
        print(json.dumps({"threads": options.threads, **document}, indent=1))
        return
    for name, figures in document.items():
        print(name)
        for what, value in figures.items():
            print(f"  {what:<56} {value:10.3f}")


if __name__ == "__main__":
    main()

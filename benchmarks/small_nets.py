"""What adapters cost a net so small that the number of operators is the cost: the quickstart's own, untrained.

    python -m benchmarks.small_nets [--bundle DIRECTORY] [--seconds N] [--json]

Four tasks of rank 8 on every convolution and linear (24 on depthwise ones), each with its head.  The cases of
`tpeft-deploy bench` with 1 and 16 rows on 1 and 2 threads: median and quartiles of the ratio to a plain session of
base.onnx with the same options, all cases in turns in one process.  With --bundle, those of a bundle that was written
before, by other code say.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle
from tpeft_deploy.quickstart.model import digits
from tpeft_deploy.runtime.bench.cases import PlainSessions, served
from tpeft_deploy.runtime.bench.measure import interleave, spread
from tpeft_deploy.runtime.sessions.providers import choose
from tpeft_deploy.tucker import TuckerDelta

TASKS, RANK, DEPTHWISE = 4, 8, 24
ROWS, THREADS = (1, 16), (1, 2)


def adapter(module: torch.nn.Module, seed: int) -> Adapter:
    """A random change of every matrix and convolution, and a head."""
    random = np.random.default_rng(seed)
    deltas, overrides = {}, {}
    for name, parameter in module.named_parameters():
        sizes = tuple(parameter.shape)
        if name.startswith("head"):
            overrides[name] = random.standard_normal(sizes, np.float32)
        elif name.endswith("weight") and len(sizes) > 1:
            rank = DEPTHWISE if "depthwise" in name else RANK
            ranks = [min(rank, size) for size in sizes[:2]] + list(sizes[2:])
            core = random.standard_normal(ranks, np.float32) / 10
            factors = [
                random.standard_normal((size, own), np.float32) / 10 if own < size else None
                for size, own in zip(sizes, ranks, strict=True)
            ]
            deltas[name] = TuckerDelta(core, tuple(factors), 1.0)
    return Adapter(deltas, overrides=overrides)


def write(place: Path) -> Bundle:
    """The bundle of the net and its tasks."""
    torch.manual_seed(0)
    module, example = digits()
    adapters = {f"task{seed}": adapter(module, seed) for seed in range(TASKS)}
    return export_bundle(module, adapters, place, example_inputs=example)


def measure(bundle: Bundle, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Threads and rows -> case -> quartiles of the ratio to the plain session, and its milliseconds."""
    found: dict[str, dict[str, list[float]]] = {}
    choice = choose("cpu")
    tasks = list(bundle.tasks)[:TASKS]
    for threads in THREADS:
        plain = PlainSessions(bundle, choice, threads)
        with Runtime(bundle.path, provider="cpu", threads=threads) as runtime:
            for rows in ROWS:
                times = interleave(served(bundle, runtime, plain, tasks, None, rows), seconds)
                for name, own in times.items():
                    ratio = spread([a / b for a, b in zip(own, times["plain"], strict=True)])
                    figures = [ratio.low, ratio.median, ratio.high, spread(own).median * 1e3]
                    found.setdefault(f"{threads} threads, {rows} rows", {})[name] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the cases of one number of rows and threads")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(options.bundle) if options.bundle else write(Path(folder) / "bundle")
        found = measure(bundle, options.seconds)
    if options.json:
        print(json.dumps(found))
        return
    for case, ratios in found.items():
        for form, (low, median, high, milliseconds) in ratios.items():
            print(f"{case:20}{form:12}{median:7.3f} [{low:.3f}, {high:.3f}] {milliseconds:8.3f} ms")


if __name__ == "__main__":
    main()

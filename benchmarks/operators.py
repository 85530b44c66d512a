"""Time of each operator in the runs of a bundle's graphs, by ONNX Runtime's profile.

    python -m benchmarks.operators BUNDLE [--rows 16] [--tasks 4] [--runs 20] [--threads 1] [--shown 10]

Columns are the base, the factored form with one adapter and the banked form with another of `--tasks` adapters for each
row, all of the example inputs, repeated; a form's graph for the CPU where the bundle has one.  Milliseconds of a run,
means over the runs behind a warming one; profiling itself makes each operator some microseconds longer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from tpeft_deploy import Bundle
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.directory import BANKED_CPU, EXAMPLE, FACTORED_CPU
from tpeft_deploy.exporters.proof.bundle_graphs import BANKED, BASE, FACTORED, banks
from tpeft_deploy.tucker import Array

__all__ = ["profile"]

_KERNEL = "_kernel_time"


def profile(file: Path, feeds: Mapping[str, Array], runs: int, threads: int) -> dict[str, float]:
    """Profile a graph.

    Args:
        file: an ONNX file.
        feeds: its inputs.
        runs: runs that are counted.
        threads: threads of ONNX Runtime.

    Returns:
        Operator -> milliseconds of a run, the largest first.
    """
    with tempfile.TemporaryDirectory() as place:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(place) / "profile")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]
    found: Counter[str] = Counter()
    for event in kernels[len(kernels) // (runs + 1) :]:
        found[event["args"]["op_name"]] += event["dur"]
    return {name: microseconds / 1000 / runs for name, microseconds in found.most_common()}


def _feeds(bundle: Bundle, rows: int, tasks: int) -> dict[str, dict[str, Array]]:
    names = list(bundle.tasks)[:tasks]
    with np.load(bundle.path / EXAMPLE) as example:
        inputs = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in example.items()}
    bank = banks(bundle, {"base": None, **{name: bundle.adapter(name) for name in names}})[BANKED]
    index = np.arange(rows, dtype=np.int64) % len(names) + 1
    factored = _for_cpu(bundle, FACTORED, FACTORED_CPU)
    banked = _for_cpu(bundle, BANKED, BANKED_CPU)
    return {
        BASE: inputs,
        factored: {**inputs, **bundle.factors(names[0])},
        banked: {**inputs, **bank, slots.INDEX: index},
    }


def _for_cpu(bundle: Bundle, portable: str, cpu: str) -> str:
    return cpu if (bundle.path / cpu).exists() else portable


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shown", type=int, default=10)
    asked = parser.parse_args()
    bundle = Bundle.open(asked.bundle)
    feeds = _feeds(bundle, asked.rows, asked.tasks)
    found = {file: profile(bundle.path / file, own, asked.runs, asked.threads) for file, own in feeds.items()}
    total = Counter({name: sum(own.get(name, 0.0) for own in found.values()) for own in found.values() for name in own})
    print("| | " + " | ".join(found) + " |\n" + "|---" * (len(found) + 1) + "|")
    for name, _ in total.most_common(asked.shown):
        print(f"| {name} | " + " | ".join(f"{own.get(name, 0.0):.2f}" for own in found.values()) + " |")
    print("| all | " + " | ".join(f"{sum(own.values()):.2f}" for own in found.values()) + " |")


if __name__ == "__main__":
    main()

"""How much memory a fold takes, as a multiple of the weights, the module's own included.

    python benchmarks/fold_memory.py [--megabytes N] [--json]

A stack of linear layers, all adapted at rank 8, goes through export_folded: traced, merged, written, opened by ONNX
Runtime and compared.  Peak and baseline (all packages loaded, a small fold done, nothing else) are this process's
resident set, read every millisecond, without pages of files, which the system can take back at any time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tpeft_deploy import Adapter, TuckerDelta, export_folded

WIDTH = 2048


class Peak:
    """The largest resident set between start and stop, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, resident())
            time.sleep(0.001)


def resident() -> int:
    """Bytes of this process in memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def fold(width: int, layers: int, place: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    random = np.random.default_rng(0)
    deltas = {}
    for name, weight in module.named_parameters():
        if weight.ndim == 2:
            factors = tuple(random.standard_normal((width, 8)).astype(np.float32) for _ in range(2))
            delta = TuckerDelta(np.eye(8, dtype=np.float32), factors)
            deltas[name] = TuckerDelta(delta.core, factors, 0.1 / delta.norm())
    inputs = {"input": torch.randn(2, width)}
    export_folded(module, Adapter(deltas), place / "folded.onnx", example_inputs=inputs)


def measure(megabytes: int) -> dict[str, float]:
    layers = max(2, round(megabytes * 1e6 / (4 * WIDTH * WIDTH)))
    with tempfile.TemporaryDirectory() as place:
        fold(8, 3, Path(place))
        baseline = resident()
        with Peak() as peak:
            fold(WIDTH, layers, Path(place))
    weights = layers * 4 * (WIDTH * WIDTH + WIDTH)
    return {
        "weights, MB": weights / 1e6,
        "peak above the baseline, MB": (peak.bytes - baseline) / 1e6,
        "peak / weights": (peak.bytes - baseline) / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.megabytes)
    print(
        json.dumps(result) if options.json else "\n".join(f"{what:<30} {value:10.3f}" for what, value in result.items())
    )


if __name__ == "__main__":
    main()

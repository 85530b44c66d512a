"""Time to choose the tokens of a step from whole logits in numpy, and by the choice graph on the CPU.

    python -m benchmarks.token_choice [--seconds 1] [--threads 1]

On the CPU the logits are in host memory in both cases, so this compares computation alone; on CUDA the graph also
saves the copy of the logits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tpeft_deploy import Sampling
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.exporters.graph.top_logits import choice_graph
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.generation.sampling import Sampler
from tpeft_deploy.runtime.generation.top_logits.device_logits import DeviceLogits, TopLogits, choices
from tpeft_deploy.runtime.sessions.providers import choose as choose_provider
from tpeft_deploy.runtime.sessions.providers import open_session
from tpeft_deploy.tucker import Array

VOCABULARIES, ROWS = (32_000, 128_256), (1, 8)
WAYS = {
    "greedy": (Sampling(), False),
    "greedy, log-probabilities": (Sampling(), True),
    "top-k 50": (Sampling(temperature=0.8, top_k=50, seed=1), False),
    "top-p 0.9": (Sampling(temperature=0.8, top_p=0.9, seed=1), False),
}


def chosen(logits: Array | DeviceLogits, samplers: Sequence[Sampler], scored: bool) -> list[int]:
    """Tokens of a step."""
    return [choose().id for choose in choices(logits, samplers, scored) if choose is not None]


def median(call: Callable[[], object], seconds: float) -> float:
    """Milliseconds of the median call."""
    call()
    times, end = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def compare(place: Path, vocabulary: int, rows: int, seconds: float, threads: int) -> None:
    """Print a line for each kind of sampling."""
    ir.save(choice_graph(vocabulary, ir.DataType.FLOAT), place / "choice.onnx")
    session = open_session(place / "choice.onnx", choose_provider("cpu"), threads=threads)
    ports = DecoderPorts("tokens", "lengths", "logits", (), 8, vocabulary)
    top = TopLogits("random", session, ports, rows, np.dtype(np.float32), "cpu")
    logits = (np.random.default_rng(0).standard_normal((rows, vocabulary)) * 4).astype(np.float32)
    logits[:, :40] += 10  # as confident as models are: a few tokens have most of the mass
    device_rows.write(top._logits, logits)
    for name, (how, scored) in WAYS.items():
        samplers = [Sampler(how, [1]) for _ in range(rows)]
        calls = [partial(chosen, given, samplers, scored) for given in (logits, DeviceLogits(top, range(rows)))]
        found = [median(call, seconds) for call in calls]
        print(f"{vocabulary:7} tokens, {rows} rows, {name:26}: numpy {found[0]:7.2f} ms, graph {found[1]:7.2f} ms")


def main() -> None:
    """Print all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for vocabulary in VOCABULARIES:
            for rows in ROWS:
                compare(Path(place), vocabulary, rows, options.seconds, options.threads)


if __name__ == "__main__":
    main()

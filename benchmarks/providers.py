"""Base and folded sessions on OpenVINO against ONNX Runtime's CPU provider, with the settings of a user.

    python -m benchmarks.providers --openvino .venv-openvino/bin/python [--models encoder convnet] [--rounds N] [--json]

The packages of the two providers cannot share an environment: each has a process, and the two take turns, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FORMS = ("base", "folded")
ROOT = Path(__file__).parents[1]
SIZES = {"encoder": (384, 6), "convnet": (256, 3)}  # width and layers


class Turn:
    """A process that runs cases on one provider when it is told to."""

    def __init__(self, python: str, provider: str, bundle: Path, threads: int | None) -> None:
        command = [python, "-m", "benchmarks.providers", "--worker", provider, str(bundle)]
        self._process = subprocess.Popen(
            command + ([] if threads is None else ["--threads", str(threads)]),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **case: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(provider: str, path: Path, threads: int | None) -> None:
    """Answer lines of standard input with seconds: what it took to open, or the median of some runs."""
    from tpeft_deploy import Bundle
    from tpeft_deploy.runtime.folding import merge
    from tpeft_deploy.runtime.sessions.factory import SessionFactory
    from tpeft_deploy.runtime.sessions.plain import Plain
    from tpeft_deploy.runtime.sessions.providers import choose

    bundle = Bundle.open(path)
    began = time.perf_counter()
    sessions = SessionFactory.of(bundle.manifest, choose(provider), threads=threads)
    held = {"base": Plain(path / "base.onnx", sessions)}
    opened = time.perf_counter() - began
    held["folded"] = merge.fold(bundle, bundle.adapter(next(iter(bundle.tasks))), sessions)
    for line in sys.stdin:
        asked = json.loads(line)
        inputs = batch(bundle, asked["rows"], asked["length"])
        times = []
        busy = time.process_time()
        for _ in range(asked["runs"]):
            begin = time.perf_counter()
            held[asked["form"]].run(inputs)
            times.append(time.perf_counter() - begin)
        busy = (time.process_time() - busy) / asked["runs"]
        print(json.dumps({"seconds": statistics.median(times), "busy": busy, "open": opened}), flush=True)


def batch(bundle: Any, rows: int, length: int) -> dict[str, Any]:
    """Inputs of the encoder with rows of a length, or of the convolutional net with its images."""
    random = np.random.default_rng(0)
    if "input_ids" in bundle.example():
        ids = random.integers(3, 1000, (rows, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {"pixel_values": random.standard_normal((rows, 3, 96, 96)).astype(np.float32)}


@contextmanager
def taking_turns(openvino: str, bundle: Path, threads: int | None) -> Iterator[dict[str, Turn]]:
    workers = {
        "cpu": Turn(sys.executable, "cpu", bundle, threads),
        "openvino": Turn(openvino, "openvino", bundle, threads),
    }
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.end()


def measure(workers: dict[str, Turn], cases: Sequence[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds, in which the providers run each case one after the other, and of their ratios.

    Seconds are those of a clock; `busy` is the processor time of all threads, which other work disturbs less.
    """
    for worker in workers.values():
        for case in cases:
            worker.ask(**case, runs=3)
    found = []
    said: list[dict[str, list[dict[str, float]]]] = [{name: [] for name in workers} for _ in cases]
    for number in range(rounds):
        for case, own in zip(cases, said, strict=True):
            for name in sorted(workers, reverse=bool(number % 2)):
                own[name].append(workers[name].ask(**case, runs=7))
    for case, own in zip(cases, said, strict=True):
        row = dict(case)
        for kind in ("seconds", "busy"):
            times = {name: [answer[kind] for answer in answers] for name, answers in own.items()}
            row |= {f"{name} {kind}": statistics.median(values) for name, values in times.items()}
            ratios = [a / b for a, b in zip(times["openvino"], times["cpu"], strict=True)]
            row[f"openvino / cpu, {kind}"] = statistics.median(ratios)
        found.append(row | {f"{name} open": answers[0]["open"] for name, answers in own.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openvino", help="interpreter of the environment with onnxruntime-openvino")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("PROVIDER", "BUNDLE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker[0], Path(given.worker[1]), given.threads)
        return
    if not given.openvino:
        parser.error("--openvino is needed")
    from benchmarks.folded_memory import make

    found = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as place:
            bundle = Path(place) / "bundle"
            make(model, *SIZES[model], bundle)
            lengths = (16, 128) if model == "encoder" else (0,)
            cases = [{"form": f, "rows": r, "length": n} for f in FORMS for r in (1, 8) for n in lengths]
            with taking_turns(given.openvino, bundle, given.threads) as workers:
                found += [{"model": model} | row for row in measure(workers, cases, given.rounds)]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for row in found:
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))


if __name__ == "__main__":
    main()

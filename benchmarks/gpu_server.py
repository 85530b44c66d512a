"""The whole server on a device: answers against the CPU's, and rows a second of clients that ask for many tasks.

python -m benchmarks.gpu_server BUNDLE --out OUT [--provider cuda] [--seconds 5] [--no-graphs]

BUNDLE is an encoder of `benchmarks.gpu build`.  The server runs beside four processes of clients;
each answer is compared with that of `Runtime` on the CPU.  OUT gets server-PROVIDER-HOW.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_fixed import error
from benchmarks.gpu_questions import tokens
from benchmarks.gpu_serving import adapter
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.client import AsyncClient

TASKS = [f"task-{number}" for number in range(32)]
PROCESSES, CONNECTIONS, SAMPLES = 4, 16, 8
# Case -> rows of a request; a request of the base asks for no adapter.
CASES = {"base, 1 row": 1, "32 tasks, 1 row": 1, "base, 8 rows": 8, "32 tasks, 8 rows of 8 tasks": 8}


def expected(bundle: Path, file: Path) -> None:
    """Write what the CPU answers: task -> logits of all samples."""
    with Runtime(bundle, provider="cpu") as runtime:
        inputs = tokens(SAMPLES)
        answers: dict[str, Any] = {task: runtime.run(inputs, task)["logits"] for task in ("base", *TASKS)}
        np.savez(file, **answers)


async def ask(url: str, case: str, seconds: float, answers: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Ask over some connections for some seconds, and compare each answer."""
    count, times, worst = CASES[case], list[float](), 0.0
    inputs, end = tokens(SAMPLES), time.perf_counter() + seconds

    async def one(client: AsyncClient, number: int) -> None:
        nonlocal worst
        random = np.random.default_rng([seed, number])
        while time.perf_counter() < end:
            rows = random.integers(0, SAMPLES, count)
            tasks = ["base"] * count if case.startswith("base") else [str(t) for t in random.choice(TASKS, count)]
            own = {name: array[rows] for name, array in inputs.items()}
            begin = time.perf_counter()
            got = await (client.infer(own, tasks[0]) if count == 1 else client.infer(own, tasks=tasks))
            times.append(time.perf_counter() - begin)
            wanted = np.stack([answers[task][row] for task, row in zip(tasks, rows, strict=True)])
            worst = max(worst, error(np.stack(list(got["logits"])), wanted))

    async with AsyncClient(url, timeout=60) as client:
        await asyncio.gather(*(one(client, number) for number in range(CONNECTIONS)))
    return {"rows": count * len(times), "times": times, "worst": worst}


def clients(url: str, case: str, options: argparse.Namespace, place: Path) -> dict[str, float]:
    """Let several processes ask at once."""
    command = [sys.executable, "-m", "benchmarks.gpu_server", str(place), "--ask", case, "--url", url]
    command += ["--seconds", str(options.seconds), "--out", str(place)]
    started = [
        subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(PROCESSES)
    ]
    found = [json.loads(process.communicate()[0]) for process in started]
    times = sorted(time for own in found for time in own["times"])
    return {
        "rows a second": sum(own["rows"] for own in found) / options.seconds,
        "p50, ms": 1e3 * statistics.median(times),
        "p99, ms": 1e3 * times[int(0.99 * len(times))],
        "worst error": max(own["worst"] for own in found),
    }


def serve(bundle: Path, place: Path, options: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """Start the server; returns the process and its address."""
    code = "from tpeft_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(bundle), "--state", str(place / "state"), "--port", "0"]
    command += ["--no-auth", "--provider", options.provider, "--no-access-log"]
    own = os.environ | {"TPEFT_CUDA_GRAPHS": str(options.provider == "cuda" and not options.no_graphs).lower()}
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=log, text=True)
    while process.poll() is None:
        found = re.search(r"serving on (http\S+)", (place / "log").read_text())
        if found:
            return process, found[1]
        time.sleep(0.1)
    raise RuntimeError((place / "log").read_text()[-2000:])


def run(options: argparse.Namespace) -> None:
    """Measure all cases."""
    report: dict[str, Any] = {"provider": options.provider, "graphs": not options.no_graphs, "cases": {}}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        path = Path(shutil.copytree(options.bundle, place / "bundle"))
        bundle = Bundle.open(path)
        for seed, task in enumerate(TASKS):
            bundle.add(task, adapter(bundle, seed))
        expected(path, place / "answers.npz")
        begin = time.perf_counter()
        process, url = serve(path, place, options)
        report["start, s"] = time.perf_counter() - begin
        for case in CASES:
            clients(url, case, argparse.Namespace(seconds=1.0), place)  # shapes that come again are recorded
            report["cases"][case] = clients(url, case, options, place)
            print(case, {name: float(f"{value:.4g}") for name, value in report["cases"][case].items()}, flush=True)
        begin = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        report["exit status"] = process.wait(60)
        report["end, s"] = time.perf_counter() - begin
        report["log"] = (place / "log").read_text()[-4000:]
    print({name: report[name] for name in ("start, s", "end, s", "exit status")})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"server-{options.provider}-{'plain' if options.no_graphs else 'graphs'}.json").write_text(
        json.dumps(report, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="How long each case is asked for.")
    parser.add_argument("--no-graphs", action="store_true", help="Do not record CUDA graphs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ask", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        answers = dict(np.load(options.bundle / "answers.npz"))
        print(json.dumps(asyncio.run(ask(options.url, options.ask, options.seconds, answers, options.seed))))
        return
    run(options)


if __name__ == "__main__":
    main()

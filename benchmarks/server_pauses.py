"""How long the slowest requests take, beside a server that collects garbage as Python does by default.

    python -m benchmarks.server_pauses --cache DIRECTORY [--rounds N] [--seconds S]

The server and the client of the table of servers (`make bench`), each on one core, with 32 connections: the server as
it is, and one in which Python collects as it does by default. They take turns, and are stopped meanwhile; the first
requests of a round, on new connections, count. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.tables.peer_cases import Batch
from benchmarks.tables.peer_models import Size, Work
from benchmarks.tables.server_load import Request, load
from benchmarks.tables.server_process import Server, free_port, started
from benchmarks.tables.servers import CONNECTIONS, ROOT, TASKS, v2_binary, v2_json

SERVE = "from tpeft_deploy.cli import main; main()"
AS_PYTHON = "import gc; gc.freeze = lambda: None; gc.set_threshold = lambda *_: None; "
SERVERS = {"as it is": SERVE, "Python's collections": AS_PYTHON + SERVE}
SHARES = {"median": 0.5, "99th percentile": 0.99, "99.9th percentile": 0.999}


@contextmanager
def serving(bundle: Path, code: str, place: Path) -> Iterator[Server]:
    """A server, stopped until its turn."""
    port = free_port()
    options = ["--no-auth", "--threads", "1", "--port", str(port), "--state", str(place / f"state-{port}")]
    command = [sys.executable, "-c", code, "serve", str(bundle), *options]
    with started(command, port, place / f"{port}.log", {"PYTHONPATH": str(ROOT)}) as server:
        server.signal(signal.SIGSTOP)
        yield server


def turn(server: Server, requests: Sequence[Request], seconds: float) -> dict[str, float]:
    server.signal(signal.SIGCONT)
    load(server.port, requests, CONNECTIONS, 0.5)
    loaded = load(server.port, requests, CONNECTIONS, seconds)
    server.signal(signal.SIGSTOP)
    quantiles = {f"{name}, ms": 1e3 * float(np.quantile(loaded.latencies, share)) for name, share in SHARES.items()}
    return {**quantiles, "requests a second": len(loaded.latencies) / loaded.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="Where exported bundles are kept.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="For each turn.")
    options = parser.parse_args()
    work = Work(options.cache, "classifier", Size(tasks=TASKS))
    batch = Batch.of(work, 0, TASKS)
    rows = [(task, batch.inputs["input"][row : row + 1]) for row, task in enumerate(batch.tasks)]
    forms = {"JSON": [v2_json(*row) for row in rows], "binary": [v2_binary(*row) for row in rows]}
    found: dict[str, list[dict[str, float]]] = {f"{form}, {name}": [] for form in forms for name in SERVERS}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(work.bundle.path, code, Path(place))) for name, code in SERVERS.items()
        }
        for _ in range(options.rounds):
            for form, requests in forms.items():
                for name, server in servers.items():
                    found[f"{form}, {name}"].append(turn(server, requests, options.seconds))
    for name, turns in found.items():
        print(name)
        for what in turns[0]:
            print(f"  {what:<30} {statistics.median(own[what] for own in turns):10.1f}")


if __name__ == "__main__":
    main()

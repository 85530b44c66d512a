"""Count the library files that one HTTP V2 binary inference enters, and how often execution changes between them.

    python -m benchmarks.files_entered_server [--list] [--json]

The server, the tasks and the request are those of benchmarks/server_layers.py; the second request is counted, so that
caches are filled.  Calls are counted on all threads, each thread for itself.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType

import tpeft_deploy.runtime
from benchmarks.server_echo import show, small
from benchmarks.server_layers import QUOTA, through_http
from tpeft_deploy import Runtime
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.server.operations.options import Options
from tpeft_deploy.runtime.server.operations.service import Service, order_of
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.rest.app import application
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics

RUNTIME = str(Path(tpeft_deploy.runtime.__file__).parent)
LIBRARY = (RUNTIME, str(Path(tpeft_deploy.__file__).parent))


class Trace:
    """Profile function that keeps the file of each call into the library, by thread."""

    def __init__(self) -> None:
        self.calls: defaultdict[int, list[str]] = defaultdict(list)

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Record a call event."""
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(LIBRARY):
            self.calls[threading.get_ident()].append(file)

    @property
    def files(self) -> Counter[str]:
        """File -> calls into it."""
        return Counter(itertools.chain.from_iterable(self.calls.values()))

    @property
    def changes(self) -> int:
        """Number of calls into another file than the call before."""
        return sum(a != b for calls in self.calls.values() for a, b in itertools.pairwise(calls))


def trace(place: Path) -> Trace:
    """Trace one request."""
    bundle, limits, found = small(place / "bundle"), Limits(max_rows=8), Trace()
    with open_state(place / "state", default=QUOTA) as state:
        order = order_of(state, limits)
        threading.setprofile(found)  # before the batching worker starts
        with Runtime(bundle.path, provider="cpu", threads=1, order=order, limits=limits) as runtime:
            metrics = Metrics(100, runtime.residency, runtime.usage, lambda: 0)
            service = Service(runtime, bundle, state, order, Options(limits=limits, observe=metrics.inference))
            ask = through_http(application(service, observe=metrics.request), state)

            async def ask_twice() -> None:
                await ask(0)
                await asyncio.sleep(0.3)  # until events are delivered and the worker waits
                found.calls.clear()
                sys.setprofile(found)
                await ask(0)
                sys.setprofile(None)

            asyncio.run(ask_twice())
            counted = Trace()
            counted.calls.update({thread: list(calls) for thread, calls in found.calls.items()})
        threading.setprofile(None)
    return counted


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="Print each file and the number of calls into it.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = trace(Path(place))
    if options.list:
        for file, calls in sorted(found.files.items()):
            print(f"{calls:4d}  {file}")
    calls = sum(found.files.values())
    show({"files": len(found.files), "changes of file": found.changes, "calls": calls}, as_json=options.json)


if __name__ == "__main__":
    main()

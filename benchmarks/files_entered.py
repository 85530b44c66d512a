"""Library files that one call enters, and how often it changes between them.

    python -m benchmarks.files_entered run BUNDLE [--list]
    python -m benchmarks.files_entered export [--list]
    python -m benchmarks.files_entered server [--list]

`run` counts one `Runtime.run`; `export` an `export_bundle` of two layers and a `load_adapter` of a PEFT LoRA; `server`
one HTTP V2 inference with binary tensors, with the server and the request of benchmarks/server_layers.py.  Caches are
filled before.  `entered` traces any other call.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import peft
import torch
from torch import nn

import tpeft_deploy
from benchmarks.server_echo import small
from benchmarks.server_layers import in_process, through_http
from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.bundle.directory import Bundle

__all__ = ["Entered", "entered", "tracing"]

# Installed as links into the repository: a file is counted by the path behind the link.
LIBRARY = Path(tpeft_deploy.__file__).resolve().parents[1]
FOLDERS = tuple(str(LIBRARY / folder) + "/" for folder in ("tpeft_deploy", "runtime", "exporters"))


@dataclass
class Entered:
    """What a call entered.

    Attributes:
        calls: library file -> functions of it that were called.
        changes: calls and returns that led from one library file to another.
    """

    calls: Counter[str] = field(default_factory=Counter)
    changes: int = 0

    def __str__(self) -> str:
        return f"{len(self.calls)} files, {sum(self.calls.values())} calls, {self.changes} changes of file"

    def clear(self) -> None:
        """Forget what was counted."""
        self.calls.clear()
        self.changes = 0


@contextmanager
def tracing() -> Iterator[Entered]:
    """Count until the end of a `with` block, in the calling thread and in threads that start within it."""
    found = Entered()
    last: dict[int, str] = {}
    names: dict[str, str | None] = {}

    def library_file(frame: FrameType | None) -> str | None:
        if frame is None or frame.f_code.co_name == "<module>":
            return None
        name = frame.f_code.co_filename
        if name not in names:
            path = str(Path(name).resolve())
            names[name] = str(Path(path).relative_to(LIBRARY)) if path.startswith(FOLDERS) else None
        return names[name]

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return"):
            return
        file = library_file(frame if event == "call" else frame.f_back)
        if event == "call" and file is not None:
            found.calls[file] += 1
        if file is not None:
            thread = threading.get_ident()
            found.changes += last.setdefault(thread, file) != file
            last[thread] = file

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def entered(call: Callable[[], object], *, warm: int = 3) -> Entered:
    """Trace one call, in the calling thread and in threads that it starts.

    Args:
        call: function to trace.
        warm: number of calls before the traced one, so that caches are filled.
    """
    for _ in range(warm):
        call()
    with tracing() as found:
        call()
    return found


def of_run(bundle: Path) -> Iterator[tuple[str, Entered]]:
    """Trace a `Runtime.run` with one task, the base, and a task for each row."""
    inputs = Bundle.open(bundle).example()
    rows = len(next(iter(inputs.values())))
    with Runtime(bundle, provider="cpu", threads=1) as runtime:
        names = [*runtime.tasks, "base"]
        mixed = [names[row % len(names)] for row in range(rows)]
        yield "one task", entered(lambda: runtime.run(inputs, names[0]))
        yield "base", entered(lambda: runtime.run(inputs))
        yield "a task for each row", entered(lambda: runtime.run(inputs, tasks=mixed))


def of_export(place: Path) -> Iterator[tuple[str, Entered]]:
    """Trace the load of an adapter and the export of a bundle."""

    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    def export() -> None:
        with tempfile.TemporaryDirectory(dir=place) as to:
            export_bundle(module(), {"a": adapter}, Path(to) / "bundle", example_inputs={"input": torch.randn(2, 8)})

    wrapped = peft.get_peft_model(module(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    wrapped.save_pretrained(place / "lora")
    adapter = load_adapter(place / "lora")
    yield "load_adapter of a PEFT LoRA", entered(lambda: load_adapter(place / "lora"))
    yield "export_bundle of two layers", entered(export, warm=1)


def of_server(place: Path) -> Iterator[tuple[str, Entered]]:
    """Trace an inference request, in the event loop's thread and in the runtime's worker."""
    bundle = small(place / "bundle")
    with tracing() as found, in_process(bundle, place / "state") as (_, _, app, state), asyncio.Runner() as loop:
        ask = through_http(app, state)

        async def ask_twice() -> None:
            await ask(0)
            await asyncio.sleep(0.3)  # until events are delivered and the worker waits
            found.clear()
            await ask(0)

        loop.run(ask_twice())
        counted = Entered(found.calls.copy(), found.changes)
    yield "HTTP V2 binary inference", counted


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "export", "server"))
    parser.add_argument("bundle", type=Path, nargs="?", help="Bundle of `run`.")
    parser.add_argument("--list", action="store_true", help="Print each file and the number of calls into it.")
    options = parser.parse_args()
    if (options.what == "run") != (options.bundle is not None):
        parser.error("`run` takes a bundle, the others none")
    with tempfile.TemporaryDirectory() as temporary:
        ways = {"run": of_run, "export": of_export, "server": of_server}
        for title, found in ways[options.what](options.bundle or Path(temporary)):
            print(f"{title}: {found}")
            for file, count in sorted(found.calls.items()) if options.list else ():
                print(f"{count:6} {file}")


if __name__ == "__main__":
    main()

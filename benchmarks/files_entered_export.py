"""Library files that an export and a plain LoRA load enter: how far a reader must go to follow one of them.

    python benchmarks/files_entered_export.py [--list]

Counts distinct library files whose functions run, and changes from one file to another.  Imports are done before, so
only calls count.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import peft
import torch
from torch import nn

import tpeft_deploy
from tpeft_deploy import export_bundle, load_adapter

_PLACES = [Path(tpeft_deploy.__file__).parent, *(Path(tpeft_deploy.__file__).parent / name for name in ("exporters",))]
_ROOTS = tuple(str(place.resolve()) for place in _PLACES)


class Files:
    """Library files entered while a function runs."""

    def __init__(self) -> None:
        self.calls = Counter[str]()
        self.changes = 0
        self._last = ""

    def watch(self, function: Callable[[], object]) -> None:
        """Run a function and count."""
        sys.setprofile(self._enter)
        try:
            function()
        finally:
            sys.setprofile(None)

    def _enter(self, frame: FrameType, event: str, argument: object) -> None:
        del argument
        code = frame.f_code
        if event != "call" or code.co_name == "<module>":
            return
        file = str(Path(code.co_filename).resolve())
        root = next((root for root in _ROOTS if file.startswith(root)), None)
        if root is None:
            return
        self.calls[file[len(str(Path(root).parent)) + 1 :]] += 1
        self.changes += file != self._last
        self._last = file


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def main() -> None:
    """Print both counts."""
    example = {"input": torch.randn(2, 8)}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        wrapped = peft.get_peft_model(_module(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        wrapped.save_pretrained(place / "lora")
        adapter = load_adapter(place / "lora")
        export_bundle(_module(), {"a": adapter}, place / "warm", example_inputs=example)
        ways = {
            "load_adapter of a PEFT LoRA": lambda: load_adapter(place / "lora"),
            "export_bundle of two layers": lambda: export_bundle(
                _module(), {"a": adapter}, place / "bundle", example_inputs=example
            ),
        }
        for name, way in ways.items():
            files = Files()
            files.watch(way)
            print(f"{name}: {len(files.calls)} files, {files.changes} changes of file")
            for file, calls in files.calls.most_common() if "--list" in sys.argv else ():
                print(f"  {calls:6} {file}")


if __name__ == "__main__":
    main()

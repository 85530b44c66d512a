"""What a table was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "this_machine"]

PACKAGES = ("onnxruntime", "numpy", "torch", "transformers")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    """Hardware and software.

    Args:
        processor: model of the CPU.
        cores: processors that this process may use.
        memory_gb: memory in GB.
        system: name and release of the operating system.
        versions: package -> version, Python included.
        commit: this repository's, with "-dirty" for changes that are not committed; empty if git does not say.
        load: mean number of running processes in the minute before.
    """

    processor: str
    cores: int
    memory_gb: float
    system: str
    versions: Mapping[str, str]
    commit: str
    load: float

    def line(self) -> str:
        """One line of text."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = f"; commit {self.commit}" if self.commit else ""
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gb:.0f} GB; {self.system}; {versions}{commit}; "
            f"load before: {self.load:.1f}"
        )


def this_machine() -> Machine:
    """Describe the machine of this process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Machine(
        _processor(),
        len(os.sched_getaffinity(0)),
        round(memory, 1),
        f"{platform.system()} {platform.release()}",
        {"Python": platform.python_version()} | _versions(),
        _commit(),
        round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = any("avx512f" in line.split() for line in lines if line.startswith("flags"))
    return (named[0] if named else platform.processor()) + (" with AVX-512" if wide else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

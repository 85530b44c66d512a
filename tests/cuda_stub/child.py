"""Commands in the environment of the CUDA that computes nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = Path(os.environ.get("CUDA_STUB", ROOT / ".venv-cuda-stub")).resolve()


def run_child(*command: str, libraries: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a module with the stub's Python.

    Args:
        command: module and its arguments.
        libraries: whether the stub's libraries are found.
        variables: further environment variables.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    if libraries:
        environment |= {"LD_LIBRARY_PATH": str(STUB)}
    return subprocess.run(
        [str(STUB / "venv/bin/python"), "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

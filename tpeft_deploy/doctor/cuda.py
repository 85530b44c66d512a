"""NVIDIA's driver, its devices, and the libraries that a build of ONNX Runtime with CUDA loads."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpeft_deploy.doctor.child import ask

__all__ = ["examine_cuda"]

_PROBE = "tpeft_deploy.doctor.probe_gpu"
_CUDNN = "libcudnn.so.9"
_SMI = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


def examine_cuda(runtimes: Mapping[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the driver, and the libraries of CUDA that the installed ONNX Runtime needs.

    Args:
        runtimes: installed builds of ONNX Runtime.
    """
    version = _cuda_of_build() if "onnxruntime-gpu" in runtimes else None
    answer = ask(_PROBE, *([] if version is None else _needed(version)))
    driver = next((line["driver"] for line in answer.lines if "driver" in line), None)
    if driver is None:
        driver = {"cuda": None, "devices": [], "reason": f"NVIDIA's driver gave no answer: {answer.failure}"}
    driver |= {"version": _driver_version(), "needs": version}
    return driver, [line for line in answer.lines if "library" in line]


def _cuda_of_build() -> str | None:
    """Version of CUDA that ONNX Runtime was built with, read without importing it."""
    found = importlib.util.find_spec("onnxruntime")
    for place in (found.submodule_search_locations if found else None) or ():
        file = Path(place) / "capi" / "build_and_package_info.py"
        if file.is_file():
            match = re.search(r"^cuda_version\s*=\s*'([0-9.]+)'", file.read_text(encoding="utf-8"), re.MULTILINE)
            return match[1] if match else None
    return None


def _needed(version: str) -> list[str]:
    major = version.partition(".")[0]
    return [f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcurand.so.10", _CUDNN]


def _driver_version() -> str | None:
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None

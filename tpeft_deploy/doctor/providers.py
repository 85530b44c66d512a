"""Whether ONNX Runtime's execution providers work, by running a session on each."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tpeft_deploy.doctor.child import ask
from tpeft_deploy.doctor.findings import Defect, Findings
from tpeft_deploy.doctor.imports import import_failures
from tpeft_deploy.installed import ONNX_RUNTIMES

__all__ = ["examine_providers"]

_PROBE = "tpeft_deploy.runtime.sessions.trial"
_PROVIDERS = ("cpu", "cuda", "openvino", "tensorrt")
_OPTIONAL = ("tensorrt",)  # needs a library that no extra installs


def examine_providers(found: Findings) -> tuple[list[dict[str, Any]], list[Defect]]:
    """Try each provider in a child process; return the outcomes, and the problems of those that are installed.

    Args:
        found: findings on builds, driver and libraries.
    """
    spec = find_spec("onnxruntime")
    if not found.runtimes and (spec is None or spec.origin is None):  # an uninstalled one may leave a folder
        reason = "ONNX Runtime is not installed: pip install 'tpeft-deploy[cpu]'"
        return [{"provider": name, "built": False, "works": False, "reason": reason} for name in _PROVIDERS], []
    failure = import_failures(["onnxruntime"]).get("onnxruntime")
    if failure is not None:
        outcomes = [{"provider": name, "built": False, "works": False, "reason": failure} for name in _PROVIDERS]
        return outcomes, [Defect(f"ONNX Runtime cannot be imported: {failure}", _reinstall(found))]
    outcomes = [_try(name) for name in _PROVIDERS]
    promised = {name for runtime in found.runtimes for name in ONNX_RUNTIMES[runtime]} - {*_OPTIONAL}
    return outcomes, [
        Defect(f"provider {own['provider']} does not work: {own['reason']}", _fix(own["provider"], found))
        for own in outcomes
        if not own["works"] and own["provider"] in promised
    ]


def _try(name: str) -> dict[str, Any]:
    answer = ask(_PROBE, name)
    outcome = next((line for line in answer.lines if "works" in line), None)
    if answer.failure is not None or outcome is None:
        outcome = {"built": True, "works": False, "reason": answer.failure or "no answer"}
    return {"provider": name, **outcome}


def _reinstall(found: Findings) -> str:
    return f"pip install --force-reinstall {' '.join(found.runtimes) or 'onnxruntime'}."


def _fix(provider: str, found: Findings) -> str:
    if provider != "cuda":
        return _reinstall(found)
    lacking = [library["library"] for library in found.libraries if library["error"] is not None]
    driver, needed = found.driver, found.driver.get("needs")
    if driver["reason"] is not None:
        return (
            f"{driver['reason']}: install NVIDIA's driver, or on a machine without a GPU 'tpeft-deploy[cpu]' "
            "in place of onnxruntime-gpu."
        )
    if needed and driver["cuda"] and _major(driver["cuda"]) < _major(needed):
        return f"This ONNX Runtime needs a driver for CUDA {needed}; the installed one ends at {driver['cuda']}."
    if lacking:
        return f"pip install 'tpeft-deploy[gpu]', which brings {', '.join(lacking)}."
    return _reinstall(found)


def _major(version: str) -> int:
    return int(version.partition(".")[0])

"""Quickstart: train five tensor adapters for one base on real data, export them and run mixed batches, in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from tpeft_deploy.errors import MissingExtra
from tpeft_deploy.progress import Steps
from tpeft_deploy.quickstart.results import Results

__all__ = ["Results", "run_quickstart"]

_STAGES = 8  # loading, training six; all that follows takes as long as one of these

_EXTRAS = {
    "sklearn": "examples",
    "matplotlib": "examples",
    "torch": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "peft": "train",
    "onnxruntime": "cpu",
}


def run_quickstart(
    out: Path,
    *,
    provider: str = "auto",
    seed: int = 0,
    effort: float = 1.0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Results:
    """Train a base and five adapters on handwritten digits, export them, run every form, and write a report.

    Args:
        out: directory to write: bundle/, adapters/, base.safetensors, digits_base.py, sample.npz, request.json,
            results.json and report.html.  An earlier quickstart there is replaced; files that the user added are kept.
        provider: execution provider of ONNX Runtime: "auto", "cuda" or "cpu".
        seed: seed of the split into train and test, and of all training.
        effort: factor of the number of training steps; below 1 accuracies drop.
        on_stage: function that is called with each stage as it begins.

    Returns:
        The measurements, as in results.json.

    Raises:
        MissingExtra: a package of an optional extra is not installed.
        TpeftError: `out` holds files that no quickstart wrote.
        ProviderUnavailable: CUDA was requested by name and cannot be used.
        NotEquivalent: a form does not reproduce the merged torch model.
    """
    begin = time.perf_counter()
    _require_packages()
    steps = Steps(on_stage, _STAGES)
    steps("load torch, PEFT and scikit-learn")
    from tpeft_deploy.quickstart.run import run

    return run(out, provider=provider, seed=seed, effort=effort, on_stage=steps, begin=begin)


def _require_packages() -> None:
    missing = [package for package in _EXTRAS if find_spec(package) is None]
    if missing:
        extras = ",".join(sorted({_EXTRAS[package] for package in missing}))
        raise MissingExtra(
            "run the quickstart",
            problem=f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            fix=f"pip install 'tpeft-deploy[{extras}]'",
        )

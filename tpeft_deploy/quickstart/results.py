"""Measurements of a quickstart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["BaseResult", "Results", "Sample", "SwitchingCost", "TaskResult"]


@dataclass(frozen=True)
class TaskResult:
    """Results of one task on its held-out images; accuracies are from 0 to 1.

    Args:
        task: name of the task in the bundle.
        classes: number of classes.
        base: accuracy without the adapter; for a task with other classes, the share of the most frequent one.
        torch: accuracy of the PEFT model.
        folded: accuracy of folded/<task>.onnx.
        factored: accuracy of factored.onnx with the adapter's factors as inputs.
        banked: accuracy of the runtime, in batches that mix the rows of all tasks.
        errors: form -> relative error of its logits against the merged torch model, in the Frobenius norm.
        adapter_bytes: bytes of the adapter's file.
        adapter_parameters: number of the adapter's parameters.
        train_seconds: seconds of training.
    """

    task: str
    classes: int
    base: float
    torch: float
    folded: float
    factored: float
    banked: float
    errors: dict[str, float]
    adapter_bytes: int
    adapter_parameters: int
    train_seconds: float


@dataclass(frozen=True)
class BaseResult:
    """Results of the base on upright digits, and its size.

    Args:
        torch: accuracy of the torch module.
        banked: accuracy of the rows of task `base` in mixed batches.
        error: relative error of those rows' logits.
        parameters: number of the base's parameters.
        bytes: bytes of the base's weights.
        train_seconds: seconds of training.
    """

    torch: float
    banked: float
    error: float
    parameters: int
    bytes: int
    train_seconds: float


@dataclass(frozen=True)
class SwitchingCost:
    """Cost of switching the task between runs of one row; medians.

    Args:
        runs: number of timed runs of each kind, interleaved.
        repeat_us: microseconds of a run with the task of the run before.
        switch_us: additional microseconds of a run with another task; noise may make it negative.
        session_us: microseconds to open a plain session of a folded model.
    """

    runs: int
    repeat_us: float
    switch_us: float
    session_us: float


@dataclass(frozen=True)
class Sample:
    """The rows of sample.npz.

    Args:
        tasks: task of each row.
        answers: correct answer of each row.
    """

    tasks: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """All measurements of a quickstart.

    Args:
        out: directory of its files.
        tasks: results per adapter.
        base: results of the base.
        switching: cost of switching the task.
        sample: rows of sample.npz.
        test_digits: number of held-out digits.
        rows_per_batch: number of rows in a mixed batch.
        provider: execution provider of the runtime, "cpu" or "cuda".
        seed: seed of the split and of all training.
        seconds: wall time of "train", "export", "measure", and "total": from the start to the report.
        versions: package -> version.
    """

    out: Path
    tasks: tuple[TaskResult, ...]
    base: BaseResult
    switching: SwitchingCost
    sample: Sample
    test_digits: int
    rows_per_batch: int
    provider: str
    seed: int
    seconds: dict[str, float]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Convert to the content of results.json, for `json.dumps`."""
        return {**asdict(self), "out": str(self.out)}

"""What a quickstart measured, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["BaseResult", "Results", "Sample", "Switching", "TaskResult"]


@dataclass(frozen=True)
class TaskResult:
    """One task, on its held-out pictures; accuracies are from 0 to 1.

    Args:
        task: its name in the bundle.
        classes: how many answers it has.
        base: accuracy without the adapter; for a task with its own answers, the share of the commonest one.
        torch: accuracy of the PEFT model.
        folded: accuracy of folded/<task>.onnx.
        factored: accuracy of factored.onnx, fed with the adapter's factors.
        banked: accuracy of the runtime, in batches that mix the rows of all tasks.
        errors: form -> relative error of its logits against the merged torch model, in the Frobenius norm.
        adapter_bytes: size of the adapter's file.
        adapter_parameters: how many numbers it holds.
        train_seconds: how long its training took.
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
    """The base on upright digits, and what a full copy of it per task would cost.

    Args:
        torch: accuracy of the torch module.
        banked: accuracy of the runtime, as the rows of task `base` in the mixed batches.
        error: relative error of those rows' logits.
        parameters: how many numbers the base holds.
        bytes: size of its weights.
        train_seconds: how long its training took.
    """

    torch: float
    banked: float
    error: float
    parameters: int
    bytes: int
    train_seconds: float


@dataclass(frozen=True)
class Switching:
    """What another task costs in the next run of one row; medians.

    Args:
        runs: how many runs of each kind were timed, interleaved.
        repeat_us: a run of the task that ran before, in microseconds.
        switch_us: what a run of another task than before costs on top, in microseconds; noise may make it negative.
        session_us: opening a plain session on a folded model instead, in microseconds.
    """

    runs: int
    repeat_us: float
    switch_us: float
    session_us: float


@dataclass(frozen=True)
class Sample:
    """The rows of sample.npz.

    Args:
        tasks: the task of each row.
        answers: the right answer of each row.
    """

    tasks: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """All of a quickstart.

    Args:
        out: where its files are.
        tasks: one per adapter.
        base: the base.
        switching: the cost of another task.
        sample: what is in sample.npz.
        test_digits: how many digits were held out.
        rows_per_batch: how many rows the mixed batches had.
        provider: what the runtime ran on, "cpu" or "cuda".
        seed: of the split and of all training.
        seconds: wall time of "train", "export", "measure", and "total": from the start to the report.
        versions: package -> version.
    """

    out: Path
    tasks: tuple[TaskResult, ...]
    base: BaseResult
    switching: Switching
    sample: Sample
    test_digits: int
    rows_per_batch: int
    provider: str
    seed: int
    seconds: dict[str, float]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it stands in results.json; `json.dumps` takes it."""
        return {**asdict(self), "out": str(self.out)}

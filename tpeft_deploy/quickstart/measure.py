"""Run the quickstart's forms, and measure accuracy and the cost of switching tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from tpeft_deploy.quickstart.data import Labels, Pixels
from tpeft_deploy.quickstart.results import SwitchingCost
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.sessions.providers import Choice, open_session
from tpeft_deploy.tucker import Array

__all__ = ["Logits", "accuracy", "majority", "mixed_logits", "session_logits", "switching", "torch_logits"]

Logits = NDArray[np.float32]

_SESSIONS = 7


def torch_logits(module: nn.Module, pixels: Pixels) -> Logits:
    """Run a torch module; return logits (N, classes)."""
    with torch.inference_mode():
        logits: Logits = module(pixels=torch.from_numpy(pixels))["logits"].numpy()
    return logits


def session_logits(
    session: onnxruntime.InferenceSession, pixels: Pixels, factors: Mapping[str, Array] | None = None
) -> Logits:
    """Run a plain ONNX Runtime session; return logits (N, classes).

    Args:
        session: session of folded/<task>.onnx or factored.onnx.
        pixels: (N, 1, 16, 16).
        factors: a task's tensors, optional inputs of factored.onnx.
    """
    (logits,) = session.run(["logits"], {"pixels": pixels, **(factors or {})})
    return np.asarray(logits, np.float32)


def mixed_logits(runtime: Runtime, pixels: Mapping[str, Pixels], rows: int) -> dict[str, Logits]:
    """Run the runtime on batches that mix the rows of all tasks.

    Args:
        runtime: runtime of the bundle.
        pixels: task -> (N, 1, 16, 16), the same N for all.
        rows: number of rows of every task in one batch; tasks alternate: a, b, c, a, b, c, ...

    Returns:
        Task -> logits (N, classes of that task).
    """
    tasks = list(pixels)
    interleaved = np.stack([pixels[task] for task in tasks], axis=1).reshape(-1, *pixels[tasks[0]].shape[1:])
    answers: dict[str, list[Array]] = {task: [] for task in tasks}
    size = rows * len(tasks)
    for start in range(0, len(interleaved), size):
        batch = interleaved[start : start + size]
        names = [tasks[row % len(tasks)] for row in range(len(batch))]
        for name, row in zip(names, runtime.run({"pixels": batch}, tasks=names)["logits"], strict=True):
            answers[name].append(row)
    return {task: np.stack(found) for task, found in answers.items()}


def accuracy(logits: Logits, labels: Labels) -> float:
    """Top-1 accuracy, from 0 to 1."""
    return float((logits.argmax(axis=1) == labels).mean())


def majority(labels: Labels) -> float:
    """Accuracy of always predicting the most frequent label."""
    return float(np.bincount(labels).max() / len(labels))


def switching(
    runtime: Runtime, folded: Path, choice: Choice, *, tasks: Sequence[str], pixels: Pixels, runs: int = 300
) -> SwitchingCost:
    """Time runs of one row that change the task against runs that repeat it, interleaved.

    Args:
        runtime: runtime of the bundle.
        folded: path of a folded model, for the time to open a session.
        choice: execution provider of that session.
        tasks: at least two tasks.
        pixels: (1, 1, 16, 16).
        runs: number of runs of each kind.
    """
    for task in tasks:
        _run_seconds(runtime, task, pixels)
    changes, repeats = [], []
    for turn in range(runs):
        task = tasks[turn % len(tasks)]
        changes.append(_run_seconds(runtime, task, pixels))
        repeats.append(_run_seconds(runtime, task, pixels))
    opened = [_open_seconds(folded, choice) for _ in range(_SESSIONS)]
    return SwitchingCost(
        runs=runs,
        repeat_us=median(repeats) * 1e6,
        switch_us=(median(changes) - median(repeats)) * 1e6,
        session_us=median(opened) * 1e6,
    )


def _run_seconds(runtime: Runtime, task: str, pixels: Pixels) -> float:
    begin = time.perf_counter()
    runtime.run({"pixels": pixels}, task=task)
    return time.perf_counter() - begin


def _open_seconds(model: Path, choice: Choice) -> float:
    begin = time.perf_counter()
    open_session(model, choice)
    return time.perf_counter() - begin

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from tpeft_deploy.quickstart import measure
from tpeft_deploy.quickstart.measure import accuracy, majority, mixed_logits, switching
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.sessions.providers import Choice
from tpeft_deploy.tucker import Array

COLUMNS = {"digits": 10, "upright": 2, "base": 10}


class Recorder:
    """Answers every row with its first pixel in as many columns as its task has."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.singles: list[str] = []

    def run(
        self, inputs: Mapping[str, Array], task: str | None = None, *, tasks: Sequence[str] = ()
    ) -> dict[str, list[Array]]:
        if task is not None:
            self.singles.append(task)
            return {}
        self.batches.append(list(tasks))
        rows = zip(inputs["pixels"], tasks, strict=True)
        return {"logits": [np.full(COLUMNS[name], row.flat[0]) for row, name in rows]}


def test_every_batch_mixes_all_tasks_and_every_row_comes_back_to_its_own() -> None:
    recorder = Recorder()
    pixels = {
        name: np.full((7, 1, 16, 16), 100 * place, np.float32) + np.arange(7, dtype=np.float32).reshape(-1, 1, 1, 1)
        for place, name in enumerate(COLUMNS)
    }
    answers = mixed_logits(cast(Runtime, recorder), pixels, rows=3)
    assert recorder.batches == [list(COLUMNS) * 3, list(COLUMNS) * 3, list(COLUMNS)]
    for place, (name, columns) in enumerate(COLUMNS.items()):
        assert answers[name].shape == (7, columns)
        assert answers[name][:, 0].tolist() == [100 * place + row for row in range(7)]


def test_switching_times_a_change_and_a_repeat_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(measure, "open_session", lambda model, choice: opened.append(model))
    recorder = Recorder()
    cost = switching(
        cast(Runtime, recorder),
        Path("a.onnx"),
        Choice("cpu", "asked for"),
        tasks=["a", "b", "c"],
        pixels=np.zeros((1, 1, 16, 16), np.float32),
        runs=4,
    )
    assert recorder.singles == ["a", "b", "c", *"aabbccaa"]
    assert set(opened) == {Path("a.onnx")}
    assert cost.runs == 4
    assert cost.repeat_us > 0
    assert cost.session_us > 0


def test_accuracy_and_majority() -> None:
    logits = np.array([[1, 2], [3, 0], [0, 1], [0, 1]], np.float32)
    assert accuracy(logits, np.array([1, 0, 0, 1])) == 0.75
    assert majority(np.array([0, 1, 1, 1])) == 0.75

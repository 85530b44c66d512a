"""A model for each adapter, as one serves them with ONNX Runtime; needs nothing but ONNX Runtime and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__all__ = ["Models", "answer", "session"]


def session(path: Path) -> Any:
    """A model with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Models:
    """The models of a directory, by the names of their files."""

    def __init__(self, directory: str) -> None:
        self.sessions = {path.stem: session(path) for path in sorted(Path(directory).glob("*.onnx"))}

    def answer(self, task: str, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        return answer(self.sessions[task], rows)


def answer(model: Any, rows: Sequence[Sequence[float]]) -> list[list[float]]:
    found: list[list[float]] = model.run(None, {"input": np.asarray(rows, np.float32)})[0].tolist()
    return found

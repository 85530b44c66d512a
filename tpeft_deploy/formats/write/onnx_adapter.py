"""ONNX Runtime's native adapter file (`.onnx_adapter`): named tensors for a factored graph's optional inputs.

It has no checksum and no metadata; a bundle stores it beside the canonical file, with its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.errors import IntegrityError, MissingExtra
from tpeft_deploy.tucker import Array

__all__ = ["FILE", "read", "write"]

FILE = "adapter.onnx_adapter"


def write(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors by input name.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    onnxruntime = _onnxruntime(f"write {path}")
    adapter = onnxruntime.AdapterFormat()
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in tensors.items()})
    adapter.export_adapter(str(path))


def read(path: Path) -> dict[str, Array]:
    """Read tensors by input name with ONNX Runtime, as an application in another language does.

    Raises:
        MissingExtra: onnxruntime is not installed.
        IntegrityError: ONNX Runtime cannot read the file.
    """
    onnxruntime = _onnxruntime(f"read {path}")
    try:
        parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    except RuntimeError as error:
        raise IntegrityError(f"read {path}", expected="an .onnx_adapter file", got=str(error)[:200]) from error
    return {str(name): np.array(value.numpy()) for name, value in parameters.items()}


def _onnxruntime(doing: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            doing,
            expected="onnxruntime to be installed",
            got="no such package",
            fix="pip install 'tpeft-deploy[cpu]' or 'tpeft-deploy[gpu]'.",
        ) from error
    return onnxruntime

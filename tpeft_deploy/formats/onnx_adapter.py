"""ONNX Runtime's native adapter file (`.onnx_adapter`): named tensors for a factored graph's optional inputs.

It has no checksum and no metadata; a bundle keeps it beside the canonical file, with its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tpeft_deploy.errors import MissingExtra
from tpeft_deploy.tucker import Array

__all__ = ["FILE", "write"]

FILE = "adapter.onnx_adapter"


def write(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors by input name.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            f"write {path}",
            expected="onnxruntime to be installed",
            got="no such package",
            fix="pip install 'tpeft-deploy[cpu]' or 'tpeft-deploy[gpu]'.",
        ) from error
    adapter = onnxruntime.AdapterFormat()
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in tensors.items()})
    adapter.export_adapter(str(path))

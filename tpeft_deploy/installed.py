"""Builds of ONNX Runtime: distributions that install the same files, and which of them are installed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["ONNX_RUNTIMES", "onnx_runtimes", "overwriting"]

# Distribution -> providers of it that this package serves with.
ONNX_RUNTIMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "onnxruntime": ("cpu",),
        "onnxruntime-gpu": ("cpu", "cuda", "tensorrt"),
        "onnxruntime-openvino": ("cpu", "openvino"),
    }
)


def onnx_runtimes() -> dict[str, str]:
    """Return the installed distributions with their versions, without importing onnxruntime."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ONNX_RUNTIMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def overwriting() -> list[str]:
    """Return the installed distributions that share one directory; two in different directories do no harm."""
    from importlib.metadata import distribution

    places = {name: str(distribution(name).locate_file("onnxruntime")) for name in onnx_runtimes()}
    found = list(places.values())
    return [name for name, place in places.items() if found.count(place) > 1]

"""Suppress remarks of torch and onnxscript during an export."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

# torch.onnx: optional packages that are not installed.  onnx_ir: initializers it leaves alone, as we ask it to.
_LOGGERS = ("torch.onnx", "onnx_ir", "onnxscript")
# What fails is raised, with its cause; these log it before, graphs included.
_SAID_TWICE = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")
_PRINTING = "torch.export._trace"  # prints the graph so far of a trace that fails


def _printing() -> dict[str, object]:
    """The names of the module of torch that prints; of nothing where this torch has no such module."""
    try:
        return vars(importlib.import_module(_PRINTING))
    except ImportError:
        return {}


@contextmanager
def quiet() -> Iterator[None]:
    """Let errors through, and neither warnings nor deprecations of the exporter's own."""
    loggers = [logging.getLogger(name) for name in (*_LOGGERS, *_SAID_TWICE)]
    printing = _printing()
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        # Said of every axis name that two inputs share, and untrue: they both get it.
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL if logger.name in _SAID_TWICE else logging.ERROR)
        printing["print"] = lambda *_args, **_keywords: None
        try:
            yield
        finally:
            printing.pop("print", None)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

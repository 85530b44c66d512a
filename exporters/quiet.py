"""Keeping remarks of the libraries below off the user's terminal while they work for us."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

# torch.onnx: optional packages that are not installed.  onnx_ir: initializers it leaves alone, as we ask it to.
_LOGGERS = ("torch.onnx", "onnx_ir", "onnxscript")


@contextmanager
def quiet() -> Iterator[None]:
    """Let errors through, and neither warnings nor deprecations of the exporter's own."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        # Said of every axis name that two inputs share, and untrue: they both get it.
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

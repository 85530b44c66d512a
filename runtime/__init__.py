"""Serving a bundle with ONNX Runtime.  Needs onnxruntime and numpy; never torch or onnx."""

from tpeft_deploy.errors import MissingExtra

try:
    import onnxruntime  # noqa: F401
except ImportError as error:
    raise MissingExtra(
        "load the runtime",
        expected="onnxruntime to be installed",
        got=str(error),
        fix="pip install 'tpeft-deploy[cpu]', or [gpu] on a CUDA machine.",
    ) from error

from tpeft_deploy.runtime.adapters.version import Source
from tpeft_deploy.runtime.batching.policy import Limits
from tpeft_deploy.runtime.runtime import Runtime

__all__ = ["Limits", "Runtime", "Source"]

"""Choosing the execution provider, with proof.

ONNX Runtime lists CUDA as available wherever its package was built for it, and falls back to the CPU with no more
than a log line.  So CUDA counts as usable only once a tensor was placed on the device, and a session counts as a
CUDA session only when it says so itself.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tpeft_deploy.errors import ProviderUnavailable

__all__ = ["ORT_ERRORS", "Choice", "Provider", "choose", "open_session"]

Provider = Literal["auto", "cuda", "cpu"]

ORT_ERRORS = (ort.Fail, ort.RuntimeException, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented)

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_FOLDER = "session.model_external_initializers_file_folder_path"
_log = logging.getLogger("tpeft_deploy.runtime")


@dataclass(frozen=True)
class Choice:
    """The provider that sessions are made with, and why.

    Args:
        device: "cuda" or "cpu", as ONNX Runtime names devices.
        reason: one line for logs and the command line.
    """

    device: Literal["cuda", "cpu"]
    reason: str


def choose(provider: str) -> Choice:
    """Turn what was asked for into a device.

    Args:
        provider: "cuda" or "cpu" by name, or "auto": CUDA where it works, else the CPU, saying so.

    Raises:
        ProviderUnavailable: no such provider, or CUDA was asked for and does not work.
    """
    if provider not in get_args(Provider):
        raise ProviderUnavailable(
            "choose an execution provider", expected=f"one of {', '.join(get_args(Provider))}", got=repr(provider)
        )
    if provider == "cpu":
        return Choice("cpu", "the CPU was asked for")
    obstacle = _cuda_obstacle()
    if obstacle is None:
        return Choice("cuda", "a tensor was placed on device 0")
    if provider == "cuda":
        raise ProviderUnavailable(
            "use the CUDA provider",
            expected="a working CUDA device",
            got=obstacle,
            fix="Install 'tpeft-deploy[gpu]' alone (not [cpu]) on a machine with an NVIDIA driver, or use 'cpu'.",
        )
    _log.info("provider auto: the CPU, as %s", obstacle)
    return Choice("cpu", obstacle)


def open_session(
    model: Path,
    choice: Choice,
    *,
    threads: int | None = None,
    half: bool = False,
    initializers: Mapping[str, onnxruntime.OrtValue] | None = None,
    content: bytes | None = None,
) -> onnxruntime.InferenceSession:
    """A session on the chosen device, and nowhere else.

    Args:
        model: the ONNX file.
        choice: from `choose`.
        threads: intra-op threads; by default one per core.
        half: whether the model computes in 16 bits.
        initializers: values in place of the file's external initializers of those names; the caller keeps them alive
            as long as the session.
        content: bytes in place of the file's own, whose external data is beside the file.

    Raises:
        ProviderUnavailable: the session came up without CUDA although CUDA was chosen.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle pools of several sessions in one process would spin against each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The default rounds the activations of quantised products to 8 bits: the base would not answer as it was proved.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if initializers:
        options.add_external_initializers(list(initializers), list(initializers.values()))
    if content is not None:
        options.add_session_config_entry(_FOLDER, str(model.parent.resolve()))
    # TF32 keeps 10 bits of the mantissa: folded and banked answers would differ by 1e-3.
    providers = [(_CUDA, {"use_tf32": "0"}), _CPU] if choice.device == "cuda" else [_CPU]
    # A pass without 16-bit kernels to offer, in which ONNX Runtime 1.32 crashes on a transposed 16-bit product.
    disabled = ["NchwcTransformer"] if half else []
    session = onnxruntime.InferenceSession(
        str(model) if content is None else content, options, providers=providers, disabled_optimizers=disabled
    )
    session.disable_fallback()
    if choice.device == "cuda" and session.get_providers()[0] != _CUDA:
        raise ProviderUnavailable(
            f"open {model.name} on CUDA",
            expected=f"a session on {_CUDA}",
            got=f"one on {', '.join(session.get_providers())}",
            fix="ONNX Runtime's log above says which library it could not load.",
        )
    return session


def _cuda_obstacle() -> str | None:
    """Why CUDA cannot be used, or None."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        return "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
    if _CUDA not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without CUDA"
    onnxruntime.preload_dlls()
    try:
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception as error:  # ONNX Runtime raises its own unexported classes and RuntimeError alike
        return f"no tensor could be placed on device 0 ({str(error).strip().splitlines()[0][:160]})"
    return None


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

"""ONNX Runtime's CUDA execution provider."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnxruntime

from tpeft_deploy.errors import ProviderUnavailable, brief
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.sessions.execution_provider import MIXED, Cuda, ExecutionProvider, mixed_installation

__all__ = ["CudaProvider"]

_TF32 = "NVIDIA_TF32_OVERRIDE"


class CudaProvider(ExecutionProvider):
    """An NVIDIA GPU."""

    label = "CUDA"
    session_provider = "CUDAExecutionProvider"
    device: Literal["cuda"] = "cuda"
    numbered = True
    _tf32_in_use: ClassVar[bool] = False
    graphs = True
    fix = "Install 'tpeft-deploy[gpu]' alone (not [cpu]) on a machine with an NVIDIA driver, or use 'cpu'."

    def options(self, cuda: Cuda) -> dict[str, str]:
        """Return the provider options for ONNX Runtime."""
        return cuda.options() | {"device_id": str(self.device_id)}

    @property
    def reason(self) -> str:  # type: ignore[override]
        """Why CUDA is chosen."""
        return f"a tensor was placed on device {self.device_id}"

    def obstacle(self) -> str | None:
        """Place a tensor on the device; return why that is impossible, or None."""
        if mixed_installation():
            return MIXED
        if self.session_provider not in onnxruntime.get_available_providers():
            return "this onnxruntime was built without CUDA"
        self._settle_tf32()
        missing = _preload()
        try:
            with device_lock.using("cuda"):
                onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), self.device, self.device_id)
        except Exception as error:  # ONNX Runtime raises unexported classes and RuntimeError alike
            why = missing or brief(str(error).strip().splitlines()[0], 160)
            return f"no tensor could be placed on device {self.device_id} ({why})"
        CudaProvider._tf32_in_use |= self.tf32
        return None

    def _settle_tf32(self) -> None:
        """Allow TF32, or rule it out, before NVIDIA's libraries are loaded, which read the environment once.

        Where every convolution plan on offer uses TF32, cuDNN is not held back by the provider option `use_tf32`.

        Raises:
            ProviderUnavailable: the process has settled it otherwise.
        """
        if not self.tf32 and not self._tf32_in_use:
            os.environ.setdefault(_TF32, "0")
        elif not self.tf32 or os.environ.get(_TF32) == "0":
            allowed, settled = ("allowed", "ruled out") if self.tf32 else ("ruled out", "allowed")
            raise ProviderUnavailable(
                f"open CUDA with TF32 {allowed}",
                expected=f"a process in which it is not {settled}",
                got="one that an earlier runtime, or NVIDIA_TF32_OVERRIDE=0 in its environment, has settled",
                fix="Use another process: NVIDIA's libraries read the setting once.",
            )


def _preload() -> str:
    """Load CUDA's and cuDNN's libraries, from the `nvidia` packages wherever they are installed.

    By itself ONNX Runtime looks for these packages beside its directory only.

    Returns:
        What it could not load, as a line; ONNX Runtime prints that to stdout, which is not ours to write to.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _load_packaged()
        printed.seek(0)
        printed.truncate()  # of a directory that lacks one library of several
        onnxruntime.preload_dlls()
    lines = printed.getvalue().splitlines()
    failed = [line.partition(": ")[2].strip() for line in lines if line.startswith("Failed to load ")]
    return brief("; ".join(failed), 160)


def _load_packaged() -> None:
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations if found else None) or ():
        for directory in sorted(Path(place).glob("cu[0-9]*/lib")):
            onnxruntime.preload_dlls(cudnn=False, directory=str(directory))
        for directory in sorted(Path(place).glob("cudnn/lib")):
            onnxruntime.preload_dlls(cuda=False, directory=str(directory))

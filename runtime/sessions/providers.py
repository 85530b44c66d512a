"""Choosing the execution provider, with proof.

ONNX Runtime lists CUDA as available wherever its package was built for it, and falls back to the CPU with no more
than a log line.  So CUDA counts as usable only once a tensor was placed on the device, and a session counts as a
CUDA session only when it says so itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime import device_lock

__all__ = [
    "DEFAULT_CUDA",
    "GRAPH_ID",
    "NOT_CAPTURED",
    "ORT_ERRORS",
    "ORT_REFUSALS",
    "Choice",
    "Cuda",
    "Provider",
    "bind",
    "choose",
    "control_flow",
    "nodes_on_cpu",
    "open_session",
]

Provider = Literal["auto", "cuda", "cpu"]

ORT_ERRORS = (ort.Fail, ort.RuntimeException, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented)
ORT_REFUSALS = (ort.InvalidArgument,)
NOT_CAPTURED = "-1"
GRAPH_ID = "gpu_graph_id"  # the entry of RunOptions that says which CUDA graph a run is

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_FOLDER = "session.model_external_initializers_file_folder_path"
_CONTROL_FLOW = ("If", "Loop", "Scan")
# The fused kernel takes 1.6 to 7 times as long as Add and LayerNormalization: benchmarks/fusions.py.
_SLOW_ON_CPU = ("SkipLayerNormFusion",)
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


@dataclass(frozen=True)
class Cuda:
    """What a session on CUDA may do; on the CPU it means nothing.

    Args:
        memory_bytes: bytes for the arena of the session: its weights and intermediate results, not the tensors that
            are bound to it.  By default all there is.
        graphs: whether runs may be captured as CUDA graphs (see `captured`).
        placement: whether the session can tell where its nodes run, as one with `graphs` can.
    """

    memory_bytes: int | None = None
    graphs: bool = False
    placement: bool = False

    def options(self) -> dict[str, str]:
        """As ONNX Runtime takes them."""
        options = {
            # TF32 keeps 10 bits of the mantissa: folded and banked answers would differ by 1e-3.
            "use_tf32": "0",
            # The default times every algorithm again for each new shape, also of a weight that is fed: a first adapter
            # of another rank would hold up every conv of the model.
            "cudnn_conv_algo_search": "HEURISTIC",
            # The default doubles, which no limit shared by several sessions has room for.
            "arena_extend_strategy": "kSameAsRequested",
        }
        if self.memory_bytes is not None:
            options["gpu_mem_limit"] = str(self.memory_bytes)
        if self.graphs:
            options["enable_cuda_graph"] = "1"
        return options


_BOTH = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
DEFAULT_CUDA = Cuda()


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
        if _both_installed():
            _log.warning("%s: uninstall both and install one", _BOTH)
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
    content: bytes | None = None,
    options: onnxruntime.SessionOptions | None = None,
    cuda: Cuda = DEFAULT_CUDA,
) -> onnxruntime.InferenceSession:
    """A session on the chosen device, and nowhere else.

    Args:
        model: the ONNX file.
        choice: from `choose`.
        threads: intra-op threads; by default one per core.
        half: whether the model computes in 16 bits.
        content: bytes in place of the file's own, whose external data is beside the file.
        options: options that are set already; the others are added.
        cuda: options of a session on CUDA.

    Raises:
        ProviderUnavailable: the session came up without CUDA although CUDA was chosen.
    """
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle pools of several sessions in one process would spin against each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The default rounds the activations of quantised products to 8 bits: the base would not answer as it was proved.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if content is not None:
        options.add_session_config_entry(_FOLDER, str(model.parent.resolve()))
    # What `control_flow` and `nodes_on_cpu` read.
    told = cuda.graphs or cuda.placement
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1" if told else "0")
    providers = [(_CUDA, cuda.options()), _CPU] if choice.device == "cuda" else [_CPU]
    disabled = [*_SLOW_ON_CPU] if choice.device == "cpu" else []
    if half:
        disabled.append("NchwcTransformer")  # without 16-bit kernels; ONNX Runtime 1.32 crashes in it
    with device_lock.opening(choice.device):
        try:
            session = onnxruntime.InferenceSession(
                str(model) if content is None else content, options, providers=providers, disabled_optimizers=disabled
            )
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what was made of the session, device memory too
            raise
    session.disable_fallback()
    if choice.device == "cuda" and session.get_providers()[0] != _CUDA:
        raise ProviderUnavailable(
            f"open {model.name} on CUDA",
            expected=f"a session on {_CUDA}",
            got=f"one on {', '.join(session.get_providers())}",
            fix="ONNX Runtime's log above says which library it could not load.",
        )
    if choice.device == "cuda":
        device_lock.free_safely(session)
    return session


def bind(session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
    """An IO binding, which like its session is freed only while nothing records."""
    binding = session.io_binding()
    if session.get_providers()[0] == _CUDA:
        device_lock.free_safely(binding)
    return binding


def control_flow(session: onnxruntime.InferenceSession) -> list[str]:
    """The nodes that no CUDA graph can hold, as "operator name".

    Args:
        session: opened with `Cuda(graphs=True)` or `Cuda(placement=True)`, on any device.
    """
    return [
        f"{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if node.op_type in _CONTROL_FLOW
    ]


def nodes_on_cpu(session: onnxruntime.InferenceSession) -> list[str]:
    """The nodes that run on the CPU, as "operator name": what the device's nodes exchange with them is copied.

    Args:
        session: as `control_flow` takes it.
    """
    return [
        f"{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
    ]


def _cuda_obstacle() -> str | None:
    """Why CUDA cannot be used, or None."""
    if _both_installed():
        return _BOTH
    if _CUDA not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without CUDA"
    # TF32 for certain: where every convolution plan on offer uses it, cuDNN is not held back by `use_tf32`.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    _preload()
    try:
        with device_lock.using("cuda"):
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception as error:  # ONNX Runtime raises its own unexported classes and RuntimeError alike
        return f"no tensor could be placed on device 0 ({str(error).strip().splitlines()[0][:160]})"
    return None


def _both_installed() -> bool:
    """Whether the imported onnxruntime is a mixture of two distributions' files.

    Two copies in different directories do not disturb each other: only one is imported.
    """
    imported = Path(onnxruntime.__file__)
    return sum(_owns(distribution, imported) for distribution in ("onnxruntime", "onnxruntime-gpu")) == 2


def _owns(distribution: str, file: Path) -> bool:
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(found.locate_file("onnxruntime/__init__.py"))).resolve() == file.resolve()


def _preload() -> None:
    """Load CUDA's and cuDNN's libraries, from the `nvidia` packages wherever they are installed.

    By itself ONNX Runtime looks for these packages beside its own directory only.
    """
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations if found else None) or ():
        for directory in sorted(Path(place).glob("cu[0-9]*/lib")):
            onnxruntime.preload_dlls(cudnn=False, directory=str(directory))
        for directory in sorted(Path(place).glob("cudnn/lib")):
            onnxruntime.preload_dlls(cuda=False, directory=str(directory))
    onnxruntime.preload_dlls()

"""Choosing the execution provider, with proof.

ONNX Runtime lists CUDA as available wherever its package was built for it, and falls back to the CPU with no more
than a log line.  So CUDA counts as usable only once a tensor was placed on the device, and a session counts as a
CUDA session only when it says so itself.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.sessions.cpu_provider import CpuProvider
from tpeft_deploy.runtime.sessions.cuda_provider import CudaProvider
from tpeft_deploy.runtime.sessions.execution_provider import (
    DEFAULT_CUDA,
    MIXED,
    Cuda,
    ExecutionProvider,
    mixed_installation,
)

__all__ = [
    "DEFAULT_CUDA",
    "GRAPH_ID",
    "NOT_CAPTURED",
    "ORT_ERRORS",
    "ORT_REFUSALS",
    "PROVIDERS",
    "Choice",
    "Cuda",
    "bind",
    "choose",
    "control_flow",
    "nodes_on_cpu",
    "open_session",
]

ORT_ERRORS = (ort.Fail, ort.RuntimeException, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented)
ORT_REFUSALS = (ort.InvalidArgument,)
NOT_CAPTURED = "-1"
GRAPH_ID = "gpu_graph_id"  # the entry of RunOptions that says which CUDA graph a run is

_CPU = CpuProvider.session_provider
_FOLDER = "session.model_external_initializers_file_folder_path"
_CONTROL_FLOW = ("If", "Loop", "Scan")
_log = logging.getLogger("tpeft_deploy.runtime")


# In the order in which "auto" tries them.
PROVIDERS: Mapping[str, ExecutionProvider] = {"cuda": CudaProvider(), "cpu": CpuProvider()}


@dataclass(frozen=True)
class Choice:
    """The execution provider that sessions are made with.

    Args:
        provider: a name of `PROVIDERS`.
        reason: one line for logs and the command line.
        device_id: number of the device, where there are several.
    """

    provider: str
    reason: str
    device_id: int = 0

    @property
    def execution(self) -> ExecutionProvider:
        """The execution provider."""
        return PROVIDERS[self.provider].on(self.device_id)

    @property
    def device(self) -> str:
        """Memory device that sessions read and write: "cpu", "cuda", or "cuda:1" for another than the first."""
        return f"{self.execution.device}:{self.device_id}" if self.device_id else self.execution.device


def choose(provider: str, *, allow_tf32: bool = False) -> Choice:
    """Turn a provider's name into one that works.

    Args:
        provider: "cuda", "cuda:1" for the second device, or "cpu" by name, or "auto": CUDA where it works, else the
            CPU, saying so.
        allow_tf32: whether CUDA may compute float32 products in TF32, for the whole process.

    Raises:
        ProviderUnavailable: no such provider, CUDA was asked for and does not work, or the process has settled TF32
            otherwise.
    """
    names = ("auto", *PROVIDERS)
    asked, numbered, number = provider.partition(":")
    may_be_numbered = asked in PROVIDERS and PROVIDERS[asked].numbered
    if asked not in names or (numbered and not (may_be_numbered and number.isascii() and number.isdecimal())):
        devices = ", ".join(f"{name}:1" for name, own in PROVIDERS.items() if own.numbered)
        raise ProviderUnavailable(
            "choose an execution provider",
            expected=f"one of {', '.join(names)}, or a numbered device as {devices}",
            got=repr(provider),
        )
    device_id = int(number or 0)
    if provider == "cpu" and mixed_installation():
        _log.warning("%s: uninstall both and install one", MIXED)
    reason = None
    for name in PROVIDERS if provider == "auto" else [asked]:
        execution = PROVIDERS[name].on(device_id, tf32=allow_tf32)
        obstacle = execution.obstacle()
        if obstacle is None:
            if reason is not None:
                _log.info("provider auto: %s, as %s", execution.label, reason)
            return Choice(name, reason or execution.reason, device_id)
        reason = obstacle
    raise ProviderUnavailable(
        f"use the {execution.label} provider",
        expected=f"a working {execution.label} device" + (f" {device_id}" if device_id else ""),
        got=reason,
        fix=execution.fix,
    )


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
        model: ONNX file.
        choice: result of `choose`.
        threads: number of intra-op threads; by default one per core.
        half: whether the model computes in 16 bits.
        content: bytes in place of the file's; external data is still read beside the file.
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
    wanted = choice.execution
    providers = [(wanted.session_provider, wanted.options(cuda))]
    if wanted.session_provider != _CPU:
        providers.append((_CPU, {}))
    disabled = list(wanted.slow_passes)
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
    if session.get_providers()[0] != wanted.session_provider:
        raise ProviderUnavailable(
            f"open {model.name} on {wanted.label}",
            expected=f"a session on {wanted.session_provider}",
            got=f"one on {', '.join(session.get_providers())}",
            fix="ONNX Runtime's log above says which library it could not load.",
        )
    if wanted.device == "cuda":
        device_lock.free_safely(session)
    return session


def bind(session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
    """An IO binding, which like its session is freed only while nothing records."""
    binding = session.io_binding()
    name = session.get_providers()[0]
    if any(own.session_provider == name and own.device == "cuda" for own in PROVIDERS.values()):
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

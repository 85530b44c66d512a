"""Choosing the execution provider, with proof.

ONNX Runtime lists CUDA as available wherever its package was built for it, and falls back to the CPU with no more
than a log line.  So CUDA counts as usable only once a tensor was placed on the device, and a session counts as a
CUDA session only when it says so itself.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.runtime.sessions.cpu_provider import CpuProvider
from tpeft_deploy.runtime.sessions.cuda_provider import CudaProvider
from tpeft_deploy.runtime.sessions.execution_provider import (
    CPU,
    DEFAULT_CUDA,
    MIXED,
    Cuda,
    ExecutionProvider,
    mixed_installation,
)
from tpeft_deploy.runtime.sessions.openvino_provider import OpenvinoProvider
from tpeft_deploy.runtime.sessions.tensorrt_provider import TensorrtProvider

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

_SMALL = 1024  # bytes; ONNX Runtime leaves initializers of up to 127 in their file
_FOLDER = "session.model_external_initializers_file_folder_path"
_CONTROL_FLOW = ("If", "Loop", "Scan")
_log = logging.getLogger("tpeft_deploy.runtime")


# In the order in which "auto" tries those that it may choose.
PROVIDERS: Mapping[str, ExecutionProvider] = {
    "cuda": CudaProvider(),
    "cpu": CpuProvider(),
    "openvino": OpenvinoProvider(),
    "tensorrt": TensorrtProvider(),
}


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
    def reference(self) -> Choice:
        """The choice of the provider that answers are compared with."""
        return replace(self, provider=self.execution.reference or self.provider)

    @property
    def device(self) -> str:
        """Memory device that sessions read and write: "cpu", "cuda", or "cuda:1" for another than the first."""
        return f"{self.execution.device}:{self.device_id}" if self.device_id else self.execution.device


def choose(provider: str, *, allow_tf32: bool = False) -> Choice:
    """Turn a provider's name into one that works.

    Args:
        provider: "cuda", "cpu", "openvino" or "tensorrt"; "cuda:1" or "tensorrt:1" for the second device; or "auto":
            CUDA where it works, else the CPU, with a line in the log.
        allow_tf32: whether CUDA may compute float32 products in TF32, for the whole process.

    Raises:
        ProviderUnavailable: no such provider, it was asked for and does not work, or the process has settled TF32
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
        _log.warning("%s: uninstall them and install one", MIXED)
    reason = None
    automatic = [name for name, own in PROVIDERS.items() if own.automatic]
    for name in automatic if provider == "auto" else [asked]:
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
    alone: bool = False,
    content: bytes | None = None,
    initializers: Mapping[str, onnxruntime.OrtValue] | None = None,
    options: onnxruntime.SessionOptions | None = None,
    cuda: Cuda = DEFAULT_CUDA,
) -> onnxruntime.InferenceSession:
    """Open a session on the chosen provider, and nowhere else.

    Args:
        model: ONNX file.
        choice: result of `choose`.
        threads: number of intra-op threads; by default one per core.
        half: whether the model computes in 16 bits.
        alone: whether no other session runs at the same time, so that threads may spin between two operators.
        content: bytes in place of the file's; external data is still read beside the file.
        initializers: name of an external initializer -> value in its place.
        options: options that are set already; the others are added.
        cuda: options of a session on CUDA.

    Raises:
        ProviderUnavailable: the session came up without the chosen provider, or a provider that compiles graphs does
            not hold this one as a whole.
    """
    wanted, values = choice.execution, dict(initializers or {})
    if wanted.compiles:
        content, values = _adapted(model, content, values, wanted)
    options = _completed(options or onnxruntime.SessionOptions(), threads, quiet=wanted.compiles, alone=alone)
    if content is not None:
        options.add_session_config_entry(_FOLDER, str(model.parent.resolve()))
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    # What `control_flow`, `nodes_on_cpu` and `_check` read.
    told = cuda.graphs or cuda.placement or wanted.compiles
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1" if told else "0")
    disabled = list(wanted.slow_passes)
    if half:
        disabled.append("NchwcTransformer")  # without 16-bit kernels; ONNX Runtime 1.32 crashes in it
    more = {"disabled_optimizers": disabled, "enable_fallback": int(not wanted.compiles)}
    source = str(model) if content is None else content
    with device_lock.opening(choice.device):
        try:
            session = onnxruntime.InferenceSession(source, options, providers=wanted.chain(cuda, threads), **more)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what was made of the session, device memory too
            if wanted.compiles:
                raise _refusal(model, wanted, "a graph that it compiles", _reason(error)) from error
            raise
    session.disable_fallback()
    session.initializers = values  # it does not hold on to their memory
    _check(session, model, wanted)
    if wanted.device == "cuda":
        device_lock.free_safely(session)
    return session


def _completed(
    options: onnxruntime.SessionOptions, threads: int | None, *, quiet: bool, alone: bool
) -> onnxruntime.SessionOptions:
    options.log_severity_level = 4 if quiet else 3  # what cannot be compiled fills pages; `_reason` returns the gist
    # Threads that spin within a run make small operators faster, but two runs at once slower.  Between runs none spins:
    # idle pools of several sessions in one process would do it against each other.
    if alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The default rounds the activations of quantised products to 8 bits: the base would not answer as it was proved.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _adapted(
    model: Path, content: bytes | None, values: dict[str, onnxruntime.OrtValue], wanted: ExecutionProvider
) -> tuple[bytes | None, dict[str, onnxruntime.OrtValue]]:
    """Return a graph in the provider's operators, None for the file itself, and the initializers to give with it."""
    read = model.read_bytes() if content is None else content
    adapted = wanted.graph(read)
    return content if adapted is read else adapted, _small(adapted, model.parent, values) | values


def _small(model: bytes, folder: Path, given: Container[str]) -> dict[str, onnxruntime.OrtValue]:
    """Return the small external initializers of a graph, without those that are given already.

    ONNX Runtime leaves them in their file, which OpenVINO then looks for in the working directory at times.
    """
    values = {}
    for name, own in onnx_bytes.declared(model).items():
        if own.external and 0 < own.length <= _SMALL and name not in given:
            with (folder / own.location).open("rb") as file:
                file.seek(own.offset)
                bits = np.frombuffer(file.read(own.length), f"u{own.length // math.prod(own.shape)}")
            array = bits.reshape(own.shape)
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, own.data_type)
    return values


def _reason(error: Exception) -> str:
    """Return the lines of a compiler's message that say what it lacks."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in others if not line.startswith(("Exception from", "Check ", "Details:", "Not Implemented"))]
    return "; ".join(said[:2] or [first])[:240]


def _check(session: onnxruntime.InferenceSession, model: Path, wanted: ExecutionProvider) -> None:
    """Refuse a session that answers from elsewhere, or from constants where it is fed."""
    if session.get_providers()[0] != wanted.session_provider:
        raise ProviderUnavailable(
            f"open {model.name} on {wanted.label}",
            expected=f"a session on {wanted.session_provider}",
            got=f"one on {', '.join(session.get_providers())}",
            fix="ONNX Runtime's log above says which library it could not load.",
        )
    if not wanted.compiles:
        return
    fed = session.get_overridable_initializers()
    if fed:
        raise _refusal(
            model, wanted, "a graph whose inputs are all fed", f"{len(fed)} factors, which it compiles as constants"
        )
    elsewhere = Counter(operator for own, operator, _ in _assigned(session) if own != wanted.session_provider)
    if elsewhere:
        named = ", ".join(f"{count} {operator}" for operator, count in sorted(elsewhere.items()))
        raise _refusal(model, wanted, "all nodes on it", f"some on another provider: {named}")


def _refusal(model: Path, wanted: ExecutionProvider, expected: str, got: str) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"open {model.name} on {wanted.label}", expected=expected, got=got, fix=f"Use '{wanted.device}'."
    )


def bind(session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
    """Return an IO binding, which like its session is freed only while nothing records."""
    binding = session.io_binding()
    name = session.get_providers()[0]
    if any(own.session_provider == name and own.device == "cuda" for own in PROVIDERS.values()):
        device_lock.free_safely(binding)
    return binding


def control_flow(session: onnxruntime.InferenceSession) -> list[str]:
    """Return the nodes that no CUDA graph can hold, as "operator name".

    Args:
        session: opened with `Cuda(graphs=True)` or `Cuda(placement=True)`, on any device.
    """
    return [f"{operator} {name}" for _, operator, name in _assigned(session) if operator in _CONTROL_FLOW]


def nodes_on_cpu(session: onnxruntime.InferenceSession) -> list[str]:
    """Return the nodes that run on the CPU, as "operator name": what the device's nodes exchange with them is copied.

    Args:
        session: as `control_flow` takes it.
    """
    return [f"{operator} {name}" for provider, operator, name in _assigned(session) if provider == CPU]


def _assigned(session: onnxruntime.InferenceSession) -> Iterator[tuple[str, str, str]]:
    """Yield provider, operator and name of each node."""
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            yield part.ep_name, node.op_type, node.name

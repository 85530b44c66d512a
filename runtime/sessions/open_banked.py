"""Which graph of a bundle serves on a device, and the session on it."""

from __future__ import annotations

import logging

from tpeft_deploy.bundle.directory import BANKED_CPU, BANKED_CUDA, EXAMPLE, Bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, Choice, Cuda

__all__ = ["banked_file", "computes_in_half", "files_to_serve", "open_banked"]

_log = logging.getLogger("tpeft_deploy.runtime")


def computes_in_half(manifest: Manifest, choice: Choice) -> bool:
    """Whether a model computes in float16.

    Raises:
        ProviderUnavailable: it computes in a format that the device does not have.
    """
    dtypes = {weight.dtype for weight in manifest.weights.values()}
    if choice.device == "cpu" and "bfloat16" in dtypes:
        raise ProviderUnavailable(
            f"open bundle {manifest.name!r}, whose weights are bfloat16, on the CPU",
            expected="CUDA: ONNX Runtime's CPU cannot compute in bfloat16",
            got=choice.reason,
            fix="Export the module with .float() or .half() for the CPU.",
        )
    return "float16" in dtypes


def banked_file(manifest: Manifest, choice: Choice) -> str:
    """The banked graph that is the fastest on a device."""
    own = BANKED_CPU if choice.device == "cpu" else BANKED_CUDA
    return own if own in manifest.files else "banked.onnx"


def files_to_serve(manifest: Manifest, choice: Choice) -> list[str]:
    """The files that sessions are made of, now or later."""
    return list(dict.fromkeys(["weights.data", "base.onnx", "banked.onnx", banked_file(manifest, choice), EXAMPLE]))


def open_banked(
    bundle: Bundle, choice: Choice, *, threads: int | None, half: bool, cuda: Cuda
) -> tuple[Session | Captured, str]:
    """A session on the banked graph, and why it is not the fastest there is, or nothing.

    Raises:
        ProviderUnavailable: CUDA graphs on the CPU.
        RunError: the model cannot be recorded as a CUDA graph.
    """
    manifest = bundle.manifest
    if cuda.graphs:
        if choice.device != "cuda":
            raise ProviderUnavailable(
                f"open bundle {manifest.name!r} with CUDA graphs", expected="the CUDA provider", got=choice.reason
            )
        file = bundle.check_file(banked_file(manifest, choice))
        memory = cuda.memory_bytes
        return Captured(file, choice, manifest, threads=threads, half=half, memory_bytes=memory), ""
    own, remark = banked_file(manifest, choice), ""
    if own == BANKED_CPU:
        try:
            return Session(bundle.check_file(own), choice, threads=threads, half=half), ""
        except ORT_ERRORS as error:
            own = "banked.onnx"
            # Internal operators of ONNX Runtime, which a build of it may lack; the portable graph says the same.
            remark = f"{BANKED_CPU} not used ({str(error).splitlines()[0][:160]})"
            _log.warning("bundle %r: %s", manifest.name, remark)
    return Session(bundle.check_file(own), choice, threads=threads, half=half, cuda=cuda), remark

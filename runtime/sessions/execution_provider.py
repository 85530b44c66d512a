"""What sessions need to know of one of ONNX Runtime's execution providers."""

from __future__ import annotations

import copy
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

import onnxruntime

from tpeft_deploy.installed import ONNX_RUNTIMES

__all__ = ["CPU", "DEFAULT_CUDA", "MIXED", "Cuda", "ExecutionProvider", "mixed_installation"]

CPU = "CPUExecutionProvider"
MIXED = f"several of {', '.join(ONNX_RUNTIMES)} are installed and overwrite each other's files"


@dataclass(frozen=True)
class Cuda:
    """Options of sessions on CUDA; ignored by other providers.

    Args:
        memory_bytes: bytes for the arena of the session: its weights and intermediate results, not the tensors that
            are bound to it.  By default all there is.
        graphs: whether runs may be captured as CUDA graphs (see `captured`).
        placement: whether the session can tell where its nodes run, as one with `graphs` can.
        tf32: whether float32 products may be computed in TF32, which `providers.choose` must have allowed.
    """

    memory_bytes: int | None = None
    graphs: bool = False
    placement: bool = False
    tf32: bool = False

    def options(self) -> dict[str, str]:
        """Return the provider options for ONNX Runtime."""
        options = {
            # TF32 keeps 10 bits of the mantissa: folded and banked answers would differ by 1e-3.
            "use_tf32": "1" if self.tf32 else "0",
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


DEFAULT_CUDA = Cuda()


class ExecutionProvider(ABC):
    """An execution provider: a further one is one module with a subclass, and an entry of `providers.PROVIDERS`.

    Attributes:
        label: name in messages.
        session_provider: name in ONNX Runtime.
        device: memory device that sessions read and write, as ONNX Runtime names it.
        device_id: number of that device.
        numbered: whether a machine may have several such devices.
        divided: whether several sessions on the one device may stand for several devices.
        tf32: whether TF32 is allowed.
        no_dtypes: dtype of weights -> providers that compute in it where this one cannot, with the reason.
        slow_passes: optimizer passes that make sessions slower.
        prepacks: whether sessions can share weights that ONNX Runtime has packed once.
        graphs: whether runs can be recorded as CUDA graphs.
        generates: whether decoders can run with caches that are updated in place.
        automatic: whether "auto" may choose the provider.
        compiles: whether graphs are compiled with their initializers as constants.  Then sessions hold whole graphs or
            raise an error, and graphs that take factors as overridable initializers are refused: they would ignore what
            is fed.
        banks: whether banked graphs are tried.
        reference: name of the provider that answers are compared with when a bundle is opened, on the same memory
            device; empty if they need no proof.
        reason: why a provider without obstacle is chosen.
        fix: advice for requests by name where it cannot be used.
    """

    label: str
    session_provider: str
    device: Literal["cpu", "cuda"]
    device_id: int = 0
    numbered: bool = False
    divided: bool = False
    tf32: bool = False
    no_dtypes: Mapping[str, str] = MappingProxyType({})
    slow_passes: tuple[str, ...] = ()
    prepacks: bool = False
    graphs: bool = False
    generates: bool = True
    automatic: bool = True
    compiles: bool = False
    banks: bool = True
    reference: str = ""
    reason: str
    fix: str = ""

    def on(self, device_id: int, *, tf32: bool = False) -> Self:
        """Return the provider for one of several devices, with or without TF32."""
        other = copy.copy(self)
        other.device_id, other.tf32 = device_id, tf32
        return other

    @abstractmethod
    def obstacle(self) -> str | None:
        """Return why the provider cannot be used, or None."""

    def options(self, cuda: Cuda) -> dict[str, str]:
        """Return the provider options for ONNX Runtime.

        Args:
            cuda: options that a provider on CUDA follows.
        """
        return {}

    def chain(self, cuda: Cuda, threads: int | None) -> list[tuple[str, dict[str, str]]]:
        """Return the providers of a session with their options, in the order in which they take nodes.

        Args:
            cuda: options that a provider on CUDA follows.
            threads: number of intra-op threads, for providers that do not use those of ONNX Runtime.
        """
        return [(self.session_provider, self.options(cuda)), (CPU, {})]

    def graph(self, model: bytes) -> bytes:
        """Return an ONNX file in operators that the provider has; the same object if nothing changes."""
        return model


def mixed_installation() -> bool:
    """Return whether the imported onnxruntime is a mixture of several distributions' files.

    Two copies in different directories do not disturb each other: only one is imported.
    """
    imported = Path(onnxruntime.__file__)
    return sum(_owns(distribution, imported) for distribution in ONNX_RUNTIMES) > 1


def _owns(distribution: str, file: Path) -> bool:
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(found.locate_file("onnxruntime/__init__.py"))).resolve() == file.resolve()

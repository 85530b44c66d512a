"""One object that makes all ONNX Runtime sessions of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import onnxruntime

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.sessions.providers import DEFAULT_CUDA, Choice, Cuda, open_session

__all__ = ["SessionFactory"]


@dataclass(frozen=True)
class SessionFactory:
    """Makes sessions with one execution provider.

    Args:
        choice: execution provider, from `providers.choose`.
        threads: number of intra-op threads per session; by default one per core.
        half: whether the model computes in 16 bits.
        alone: whether sessions run one at a time: those of a decoder, which one thread drives.
        cuda: options of sessions on CUDA; ignored by other providers.
    """

    choice: Choice
    threads: int | None = None
    half: bool = False
    alone: bool = False
    cuda: Cuda = DEFAULT_CUDA

    @classmethod
    def of(cls, manifest: Manifest, choice: Choice, *, threads: int | None = None, cuda: Cuda = DEFAULT_CUDA) -> Self:
        """Return the factory for a bundle's graphs.

        Args:
            manifest: bundle to serve; the dtypes of its weights decide about `half`.
            choice: execution provider, from `providers.choose`.
            threads: number of intra-op threads per session.
            cuda: options of sessions on CUDA.

        Raises:
            ProviderUnavailable: the provider does not compute in the weights' dtype, cannot generate with the bundle's
                decoder, or records no CUDA graphs.
        """
        execution = choice.execution
        if cuda.graphs and not execution.graphs:
            raise ProviderUnavailable(
                f"open bundle {manifest.name!r} with CUDA graphs", expected="the CUDA provider", got=choice.reason
            )
        if manifest.decoder is not None and not execution.generates:
            raise ProviderUnavailable(
                f"open bundle {manifest.name!r}, with a decoder, on {execution.label}",
                expected="a provider that updates the decoder's caches in place",
                got=choice.reason,
                fix=f"Use '{execution.device}'.",
            )
        dtypes = {weight.dtype for weight in manifest.weights.values()}
        for dtype in dtypes & execution.no_dtypes.keys():
            raise ProviderUnavailable(
                f"open bundle {manifest.name!r}, with weights in {dtype}, on {execution.label}",
                expected=execution.no_dtypes[dtype],
                got=choice.reason,
                fix="Export the module with .float() or .half() for the CPU.",
            )
        alone = manifest.decoder is not None and choice.device == "cpu"
        return cls(choice, threads, "float16" in dtypes, alone, cuda)

    @property
    def device(self) -> str:
        """Memory device that sessions read and write, as `Choice.device`."""
        return self.choice.device

    @property
    def reference(self) -> Self:
        """The same factory for the provider that answers are compared with."""
        return replace(self, choice=self.choice.reference)

    def with_cuda(self, *, graphs: bool, placement: bool = False) -> Self:
        """Return the same factory with other CUDA options.

        Args:
            graphs: whether runs may be recorded as CUDA graphs.
            placement: whether sessions report the provider of each node.
        """
        return replace(self, cuda=replace(self.cuda, graphs=graphs, placement=placement))

    def open(
        self,
        model: Path,
        *,
        content: bytes | None = None,
        initializers: Mapping[str, onnxruntime.OrtValue] | None = None,
        options: onnxruntime.SessionOptions | None = None,
    ) -> onnxruntime.InferenceSession:
        """Open a session.

        Args:
            model: ONNX file.
            content: bytes in place of the file's; external data is still read beside the file.
            initializers: name of an external initializer -> value in its place.
            options: session options to add to.

        Raises:
            ProviderUnavailable: as `open_session`.
        """
        return open_session(
            model,
            self.choice,
            threads=self.threads,
            half=self.half,
            alone=self.alone,
            content=content,
            initializers=initializers,
            options=options,
            cuda=self.cuda,
        )

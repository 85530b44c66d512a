"""The graphs of a bundle that serve on a device, and the session on the banked one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tpeft_deploy.bundle.directory import (
    BANKED_CPU,
    BANKED_CUDA,
    BANKED_ROWS,
    EXAMPLE,
    FACTORED_CPU,
    FACTORED_CUDA,
    Bundle,
)
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.bundle.packing import Packed
from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS

__all__ = ["ServedGraphs", "factored_graph", "open_banked"]

_PORTABLE, _FACTORED = "banked.onnx", "factored.onnx"
_log = logging.getLogger("tpeft_deploy.runtime")


@dataclass(frozen=True)
class ServedGraphs:
    """Files that one device serves from.

    Attributes:
        banked: fastest banked graph for the device.
        fallback: banked graph that takes the same inputs, for builds of ONNX Runtime that cannot open `banked`.
        packing: inputs of `banked` that stand in place of several inputs of the portable graph.
        rows: graph for steps of a decoder, which reads rows that are gathered already; None where there is none.
        choice: graph that finds the largest logits of a decoder; None where there is none.
    """

    banked: str
    fallback: str | None = None
    packing: Sequence[Packed] = ()
    rows: str | None = None
    choice: str | None = None

    @classmethod
    def on(cls, provider: str, manifest: Manifest) -> ServedGraphs:
        """Return the graphs that a bundle has for an execution provider."""
        choice = (manifest.decoder and manifest.decoder.choice) or None
        if provider == "cpu" and BANKED_CPU in manifest.files:
            # It uses internal operators of ONNX Runtime, which a build may lack.
            return cls(BANKED_CPU, fallback=_PORTABLE, choice=choice)
        if provider == "cuda" and BANKED_CUDA in manifest.files:
            return cls(BANKED_CUDA, packing=manifest.packing, choice=choice)
        rows = BANKED_ROWS if provider == "cpu" and BANKED_ROWS in manifest.files else None
        return cls(_PORTABLE, rows=rows, choice=choice)

    @property
    def files(self) -> list[str]:
        """All files that sessions read, now or later."""
        further = [file for file in (self.rows, self.choice) if file is not None]
        return list(dict.fromkeys(["weights.data", "base.onnx", _PORTABLE, self.banked, *further, EXAMPLE]))


def factored_graph(provider: str, manifest: Manifest) -> str:
    """File of the fastest factored graph that a bundle has for an execution provider."""
    own = {"cpu": FACTORED_CPU, "cuda": FACTORED_CUDA}.get(provider, _FACTORED)
    return own if own in manifest.files else _FACTORED


def open_banked(bundle: Bundle, graphs: ServedGraphs, sessions: SessionFactory) -> tuple[Session | Captured, str]:
    """Open a session on the banked graph, with its first run where the bundle has a graph for steps of a decoder.

    Args:
        bundle: bundle to serve.
        graphs: graphs for the device.
        sessions: makes the session.

    Returns:
        The session, and why it is not on the fastest graph, or not on the provider but on its reference; an empty
        string where it is.

    Raises:
        ProviderUnavailable: the session is not on the provider, which has no reference.
        RunError: the model cannot be recorded as a CUDA graph.
    """
    execution = sessions.choice.execution
    if not execution.reference:
        return _open(bundle, graphs, sessions)
    try:
        if execution.banks:
            return Session(bundle.check_file(graphs.banked), sessions), ""
        remark = f"{graphs.banked} not used ({execution.label} compiles base and folded graphs only)"
    except ProviderUnavailable as error:
        remark = f"{graphs.banked} not used ({error.got or error.problem})"
    _log.warning("bundle %r: %s: only the base and folded tasks are served", bundle.manifest.name, remark)
    return Session(bundle.check_file(graphs.banked), sessions.reference), remark


def _open(bundle: Bundle, graphs: ServedGraphs, sessions: SessionFactory) -> tuple[Session | Captured, str]:
    file = bundle.check_file(graphs.banked)
    if sessions.cuda.graphs:
        return Captured(file, sessions, bundle.manifest), ""
    if graphs.rows is not None:  # a process that only generates needs one packed copy of the weights, not two
        return Session(lambda: bundle.check_file(graphs.banked), sessions), ""
    try:
        return Session(file, sessions), ""
    except ORT_ERRORS as error:
        if graphs.fallback is None:
            raise
        remark = f"{graphs.banked} not used ({str(error).splitlines()[0][:160]})"
    _log.warning("bundle %r: %s", bundle.manifest.name, remark)
    return Session(bundle.check_file(graphs.fallback), sessions), remark

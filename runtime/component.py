"""One graph of a bundle as it is served: files, sessions, queue and folded sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TypeVar

import onnxruntime

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.version import Content, Version
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.batching.dispatch import Dispatcher
from tpeft_deploy.runtime.batching.policy import Limits, Order
from tpeft_deploy.runtime.batching.worker import Batcher
from tpeft_deploy.runtime.component_files import ComponentFiles
from tpeft_deploy.runtime.devices.spread import AnyResidency, SpreadResidency
from tpeft_deploy.runtime.engine import Engine
from tpeft_deploy.runtime.folding.manager import FoldManager
from tpeft_deploy.runtime.reference_check import check_provider
from tpeft_deploy.runtime.replica import Replica
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.factory import SessionFactory

T = TypeVar("T")

__all__ = ["ServedComponent", "queue_orders"]


class ServedComponent:
    """A served graph; safe to use from several threads.

    Args:
        name: name of the component; empty for the only one.
        files: files to serve from.
        sessions: per device, makes the sessions.
        residencies: per device, residency of the versions, shared by all components.
        residency: residency of the versions on all devices, likewise.
        loader: loads versions, likewise.
        limits: limits of the queue.
        order: order of the queue.
        folded_bytes: bytes for sessions of hot tasks, on each device.

    Attributes:
        name: name of the component, as above.
        bundle: the component's files.
        manifest: manifest of the component.
        layout: layout of its banked graph.
        replicas: its sessions, per device.
        batcher: queue of requests, in front of all devices.
        dispatcher: takes requests of `Runtime.infer`.
    """

    def __init__(
        self,
        name: str,
        files: ComponentFiles,
        sessions: Sequence[SessionFactory],
        residencies: Sequence[Residency],
        residency: AnyResidency,
        loader: AdapterLoader,
        limits: Limits,
        order: Order[Form] | None,
        folded_bytes: int,
    ) -> None:
        self.name = name
        self._prefix = f"{name}/" if name else ""
        self.bundle = files.bundle
        self.manifest = files.bundle.manifest
        self.layout = files.layout
        self._graphs, self._sessions = files.graphs, sessions[0]
        self._spread = residency if isinstance(residency, SpreadResidency) else None
        self.replicas: list[Replica] = []
        with ExitStack() as failed:
            failed.callback(self.close_sessions)
            for place, (own, banks) in enumerate(zip(sessions, residencies, strict=True)):
                self.replicas.append(Replica(name, files, own, banks, folded_bytes, place))
            failed.pop_all()
        run_batch, *more = [replica.run_held for replica in self.replicas]
        self.batcher = Batcher(self.manifest, run_batch, limits, order=order, more=more)
        self.dispatcher = Dispatcher(self.manifest, residency, loader, self.batcher)

    @property
    def session(self) -> Session | Captured:
        """Session of the banked graph on the first device."""
        return self.replicas[0].session

    @property
    def engine(self) -> Engine:
        """Runs of rows on the first device."""
        return self.replicas[0].engine

    @property
    def folds(self) -> FoldManager:
        """Folded sessions on the first device."""
        return self.replicas[0].folds

    def replica(self, versions: Sequence[Version]) -> Replica:
        """Return the replica for a run of versions."""
        return self.replicas[0 if self._spread is None else self._spread.choose(versions)]

    def keep_folded(self, version: Version) -> list[Future[None]]:
        """Fold a version on every device, as `FoldManager.keep`."""
        return [own.folds.keep(version.on(place)) for place, own in enumerate(self.replicas)]

    def drop_folded(self, version: Version) -> None:
        """Serve a version from the banks again, as `FoldManager.drop`."""
        for place, own in version.everywhere():
            self.replicas[place].folds.drop(own)

    def is_folded(self, version: Version) -> bool:
        """Whether a version is served by a folded session on any device."""
        return any(self.replicas[place].folds.has(own) for place, own in version.everywhere())

    def lay_out(self, adapter: Adapter, *, bundle: str) -> Content:
        """Compute an adapter's rows for this component.

        Args:
            adapter: adapter of the bundle's base, with changes in any of its components.
            bundle: name of the bundle, for messages.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch, AdapterError: it does not fit.
        """
        part = self.bundle.part(adapter)
        if part is None:
            return Content({}, self._named(fit.sizes(self.manifest, None)))
        filled = fit.fill(self.manifest, part, bundle=bundle, base_value=self.bundle.base_value)
        rows = self.layout.rows(fit.named(self.manifest, filled))
        return Content(self._named(rows), self._named(fit.sizes(self.manifest, part)))

    def changed_by(self, version: Version) -> bool:
        """Whether a version that has been read changes anything in this component."""
        return not self._prefix or any(own.startswith(self._prefix) for own in version.changes)

    def open_rows(self) -> Session | None:
        """Open the graph for steps of a decoder, if the bundle has one for the device."""
        file = self._graphs.rows
        return None if file is None else Session(self.bundle.check_file(file), self._sessions)

    def open_choice(self) -> onnxruntime.InferenceSession | None:
        """Open the graph that finds the largest logits of a decoder, if the bundle has one."""
        file = self._graphs.choice
        return None if file is None else self._sessions.open(self.bundle.check_file(file))

    @property
    def only_folded(self) -> bool:
        """Whether tasks without a folded session are refused, as the provider does not compute the bank."""
        return any(own.only_folded for own in self.replicas)

    def check_provider(self, versions: Sequence[Version]) -> None:
        """Compare the provider's answers with those of its reference on every device, as `check_provider`."""
        for own in self.replicas:
            check_provider(own, versions)

    def close_sessions(self) -> None:
        """Let the sessions go and end their threads."""
        for own in self.replicas:
            own.close_session()

    def _named(self, values: Mapping[str, T]) -> Mapping[str, T]:
        return {self._prefix + name: value for name, value in values.items()} if self._prefix else values


def queue_orders(
    bundle: Bundle, order: Order[Form] | Callable[[str], Order[Form]] | None
) -> dict[str, Order[Form] | None]:
    """Return the order of each component's queue; None is first come, first served.

    Raises:
        InputError: one order is given for several queues.
    """
    names = list(bundle.components)
    if order is not None and not callable(order) and len(names) > 1:
        raise InputError(
            f"serve bundle {bundle.manifest.name!r}",
            expected=f"order as a function, which returns one for the queue of each of {', '.join(names)}",
            got="one order",
        )
    return {name: order(name) if callable(order) else order for name in names}

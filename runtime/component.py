"""One graph of a bundle as it is served: files, sessions, queue and folded sessions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import InputError, ProviderUnavailable, RunError
from tpeft_deploy.runtime.adapters.bank import Layout
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.version import Content, Version
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.batching.dispatch import Dispatcher
from tpeft_deploy.runtime.batching.policy import Limits, Order
from tpeft_deploy.runtime.batching.worker import Batcher
from tpeft_deploy.runtime.engine import Engine, translated
from tpeft_deploy.runtime.folding import compare
from tpeft_deploy.runtime.folding.manager import FoldManager
from tpeft_deploy.runtime.private_copy import PrivateCopy
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs, open_banked
from tpeft_deploy.tucker import Array

T = TypeVar("T")

__all__ = ["ServedComponent", "ComponentFiles", "queue_orders"]


@dataclass(frozen=True, eq=False)
class ComponentFiles:
    """Files that one component is served from.

    Attributes:
        bundle: component of the bundle, or a private copy of it.
        graphs: its graphs for the device.
        copy: directory of this process for the component.
        layout: layout of its banked graph.
    """

    bundle: Bundle
    graphs: ServedGraphs
    copy: PrivateCopy
    layout: Layout

    @classmethod
    def open(cls, bundle: Bundle, provider: str, *, own_copy: bool, opened: ExitStack) -> ComponentFiles:
        """Check the files of a component, and copy them where `own_copy` is set.

        Args:
            bundle: component of a bundle.
            provider: name of the provider of the banked graph.
            own_copy: whether to serve from a copy.
            opened: takes the removal of the copy.

        Raises:
            IntegrityError: a file was altered.
        """
        graphs = ServedGraphs.on(provider, bundle.manifest)
        copy = PrivateCopy(bundle, graphs.files if own_copy else [])
        opened.callback(copy.close)
        if not own_copy:
            bundle.check_file("weights.data")
        served = copy.bundle if own_copy else bundle
        return cls(served, graphs, copy, Layout.of(served, graphs.packing))


class ServedComponent:
    """A served graph; safe to use from several threads.

    Args:
        name: name of the component; empty for the only one.
        files: files to serve from.
        sessions: makes the sessions.
        residency: residency of the versions, shared by all components.
        loader: loads versions, likewise.
        limits: limits of the queue.
        order: order of the queue.
        folded_bytes: bytes for sessions of hot tasks.

    Attributes:
        name: name of the component, as above.
        bundle: the component's files.
        manifest: manifest of the component.
        layout: layout of its banked graph.
        session: session of the banked graph.
        remark: why the session is not on the fastest graph; empty where it is.
        engine: runs of rows on versions.
        folds: folded sessions.
        dispatcher: takes requests of `Runtime.infer`.
    """

    def __init__(
        self,
        name: str,
        files: ComponentFiles,
        sessions: SessionFactory,
        residency: Residency,
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
        self.folds = FoldManager(
            files.bundle, sessions, self._banked_outputs, place=files.copy.path, budget=folded_bytes
        )
        self._rows, self._banked, self._sessions = files.graphs.rows, files.graphs.banked, sessions
        self._residency = residency
        self.session, self.remark = open_banked(files.bundle, files.graphs, sessions)
        self.engine = Engine(
            self.manifest, self.session, residency, self.folds, name, only_folded=self.remark if self.elsewhere else ""
        )
        self.batcher = Batcher(self.manifest, self.engine.run_held, limits, order=order)
        self.dispatcher = Dispatcher(self.manifest, residency, loader, self.batcher)

    @property
    def elsewhere(self) -> bool:
        """Whether the bank is not on the provider but on its reference, and answers no requests."""
        return bool(self.remark) and bool(self._sessions.choice.execution.reference)

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
        return not self._prefix or any(own.startswith(self._prefix) for own in version.shapes)

    def open_rows(self) -> Session | None:
        """Open the graph for steps of a decoder, if the bundle has one for the device."""
        return None if self._rows is None else Session(self.bundle.check_file(self._rows), self._sessions)

    def check_provider(self, base: Version, task: Version | None) -> None:
        """Compare a provider that is not exact by construction with its reference, before the component answers.

        Args:
            base: version of the base.
            task: version of a task, if there is one.

        Raises:
            ProviderUnavailable: the answers differ, or the base cannot be opened.
        """
        if self.elsewhere:
            try:
                self.folds.begin(base).result()  # compared with the bank, which is on the reference
            except RunError as error:
                label = self._sessions.choice.execution.label
                raise ProviderUnavailable(
                    f"open bundle {self.manifest.name!r} on {label}", problem=str(error)
                ) from error
        elif self._sessions.choice.execution.reference and isinstance(self.session, Session):
            reference = Session(self.bundle.check_file(self._banked), self._sessions.reference)
            for version in [base] if task is None else [base, task]:
                self._compare(self.session, reference, version)

    def _compare(self, session: Session, reference: Session, version: Version) -> None:
        inputs, limit = self.bundle.example(), compare.limit_of(self.manifest)
        with self._residency.acquire([version]), translated(self.manifest.name):
            bank, rows = self._residency.rows([version], self.name)
            index = np.array(rows, np.int64)
            found = session.run(bank, inputs, index)
            # Bindings belong to a session.
            error = compare.agree(found, reference.run(replace(bank, bindings=deque()), inputs, index))
        if not error <= limit:
            raise ProviderUnavailable(
                f"open bundle {self.manifest.name!r} on {self._sessions.choice.execution.label}",
                expected=f"the example's answer for {version.name!r} with a relative error up to {limit:g}",
                got=f"one of {error:.2e}",
                fix=f"Use {self._sessions.reference.choice.provider!r}, and please report the model.",
            )

    def close_session(self) -> None:
        """End the thread of a session with CUDA graphs."""
        if isinstance(self.session, Captured):
            self.session.close()

    def _named(self, values: Mapping[str, T]) -> Mapping[str, T]:
        return {self._prefix + name: value for name, value in values.items()} if self._prefix else values

    def _banked_outputs(self, inputs: Mapping[str, Array], version: Version) -> dict[str, Array]:
        return self.engine.run_banked(inputs, version)


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

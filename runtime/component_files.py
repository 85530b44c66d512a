"""Files that one graph of a bundle is served from."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.runtime.adapters.bank import Layout
from tpeft_deploy.runtime.private_copy import PrivateCopy
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs

__all__ = ["ComponentFiles"]


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

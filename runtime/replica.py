"""One graph of a bundle on one of the devices that it is served on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnxruntime

from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.component_files import ComponentFiles
from tpeft_deploy.runtime.engine import Engine, Outputs
from tpeft_deploy.runtime.folding.manager import FoldManager
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.served_graphs import open_banked
from tpeft_deploy.tucker import Array

__all__ = ["Replica"]


class Replica:
    """Sessions of a component on one device; safe to use from several threads.

    Args:
        name: name of the component; empty for the only one.
        files: files to serve from.
        sessions: makes the sessions.
        residency: residency of the versions on the device.
        folded_bytes: bytes for sessions of hot tasks.
        place: index of the device.

    Attributes:
        name, files, sessions, residency: as above.
        session: session of the banked graph.
        remark: why the session is not on the fastest graph, or not on the provider; empty where it is.
        only_folded: why versions without a folded session are refused: the bank is not on the provider but on its
            reference; empty where the bank answers requests.
        engine: runs of rows on versions.
        folds: folded sessions.
    """

    def __init__(
        self,
        name: str,
        files: ComponentFiles,
        sessions: SessionFactory,
        residency: Residency,
        folded_bytes: int,
        place: int,
    ) -> None:
        self._place = place
        self.name, self.files, self.sessions, self.residency = name, files, sessions, residency
        self.folds = FoldManager(
            files.bundle, sessions, self._banked_outputs, place=files.copy.path, budget=folded_bytes
        )
        self.session, self.remark = open_banked(files.bundle, files.graphs, sessions)
        self.only_folded = self.remark if sessions.choice.execution.reference else ""
        self.engine = Engine(
            files.bundle.manifest, self.session, residency, self.folds, name, only_folded=self.only_folded
        )

    def own(self, versions: Sequence[Version]) -> Sequence[Version]:
        """Return the counterparts of versions on this device."""
        return [version.on(self._place) for version in versions] if self._place else versions

    def run_held(
        self, inputs: Mapping[str, Array], versions: Sequence[Version], options: onnxruntime.RunOptions
    ) -> Outputs:
        """As `Engine.run_held`, for versions that are held on this device."""
        return self.engine.run_held(inputs, self.own(versions), options)

    def close_session(self) -> None:
        """Let folded sessions go, and end the thread of a session with CUDA graphs."""
        self.folds.close()
        if isinstance(self.session, Captured):
            self.session.close()

    def _banked_outputs(self, inputs: Mapping[str, Array], version: Version) -> dict[str, Array]:
        return self.engine.run_banked(inputs, version)

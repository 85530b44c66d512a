"""Runs of rows on versions: on a folded session where there is one, else together on the bank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import CapacityError, InputError, ProviderUnavailable, RunError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.bank import qualified
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.folding.manager import FoldManager
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, ORT_REFUSALS
from tpeft_deploy.tucker import Array

__all__ = ["Engine", "Outputs", "translated"]

Outputs = dict[str, Array | list[Array]]
_OUT_OF_RANGE = "out of data bounds"  # part of Gather's message, which comes with several classes


class Engine:
    """Answers batches; safe to use from several threads.

    Args:
        manifest: manifest of the bundle.
        banked: session for all versions.
        residency: residency of the versions.
        folded: sessions of the base and of hot versions.
        component: name of the component; empty for the only one.
        only_folded: why versions without a folded session are refused; empty where the bank serves them.
    """

    def __init__(
        self,
        manifest: Manifest,
        banked: Session | Captured,
        residency: Residency,
        folded: FoldManager,
        component: str = "",
        *,
        only_folded: str = "",
    ) -> None:
        self._only_folded = only_folded
        self._manifest = manifest
        self._component = component
        self._sized = [(port, qualified(component, port.name)) for port in manifest.outputs]
        self._banked = banked
        self._residency = residency
        self._folded = folded

    def run_one(
        self,
        inputs: Mapping[str, Array],
        version: Version,
        options: onnxruntime.RunOptions | None = None,
        *,
        held: bool = False,
    ) -> dict[str, Array]:
        """Run all rows on one version.

        Args:
            inputs: input name -> array, checked.
            version: version of all rows.
            options: options of the run; setting `terminate` stops it.
            held: whether the caller has acquired the version; else it is acquired where no folded session serves it.

        Raises:
            AdapterError, BundleError, CapacityError: it cannot be brought to the device.
            ProviderUnavailable: it has no folded session, and the bank is not on the provider.
        """
        session = self._folded.find(version, requests.rows(self._manifest, inputs))
        if session is not None:
            with translated(self._manifest.name):
                return session.run(inputs, options)
        if self._only_folded:
            raise ProviderUnavailable(
                f"run task {version.name!r} of bundle {self._manifest.name!r}",
                expected="a task with a folded session",
                got=self._only_folded,
                fix="Pin it with folded=True, or use another provider.",
            )
        if held:
            return self._on_bank(inputs, version, options)
        with self._residency.acquire([version]):
            return self._on_bank(inputs, version, options)

    def run_banked(self, inputs: Mapping[str, Array], version: Version) -> dict[str, Array]:
        """As `run_one`, on the bank even where there is a folded session."""
        with self._residency.acquire([version]):
            return self._on_bank(inputs, version, None)

    def run_rows(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version],
        options: onnxruntime.RunOptions | None = None,
        *,
        held: bool = False,
    ) -> Outputs:
        """Run each row on the version of its task.

        Args:
            inputs: input name -> array, checked.
            versions: version of each row.
            options: as for `run_one`.
            held: whether the caller has acquired the versions; then the run never waits.

        Returns:
            Output name -> array, or a list with one array a row where the output's size varies per task; without the
            outputs that depend on the batch as a whole, where versions differ.

        Raises:
            AdapterError, BundleError, CapacityError: one of them cannot be brought to the device.
        """
        distinct = list(dict.fromkeys(versions))
        if len(distinct) == 1:
            outputs = self.run_one(inputs, distinct[0], options, held=held)
            return {port.name: requests.as_rows(port, outputs[port.name]) for port in self._manifest.outputs}
        if self._manifest.rows == "group" or self._only_folded:
            return self._in_parts(inputs, versions, [[version] for version in distinct], options, held=held)
        if held:
            return self._on_rows(inputs, versions, options)
        try:
            with self._residency.acquire(distinct):
                return self._on_rows(inputs, versions, options)
        except CapacityError:
            # Fewer at a time may fit; one that does not fit alone raises again.
            half = (len(distinct) + 1) // 2
            return self._in_parts(inputs, versions, [distinct[:half], distinct[half:]], options)

    def run_held(
        self, inputs: Mapping[str, Array], versions: Sequence[Version], options: onnxruntime.RunOptions
    ) -> Outputs:
        """As `run_rows`, for versions that the caller has acquired: never waits."""
        return self.run_rows(inputs, versions, options, held=True)

    def _on_bank(
        self, inputs: Mapping[str, Array], version: Version, options: onnxruntime.RunOptions | None
    ) -> dict[str, Array]:
        outputs = self._run_bank(inputs, [version], options)
        sizes = version.sizes
        return {port.name: requests.cut(port, outputs[port.name], sizes.get(key, 0)) for port, key in self._sized}

    def _on_rows(
        self, inputs: Mapping[str, Array], versions: Sequence[Version], options: onnxruntime.RunOptions | None
    ) -> Outputs:
        outputs = self._run_bank(inputs, versions, options)
        return {
            port.name: requests.cut_rows(port, outputs[port.name], [version.sizes.get(key, 0) for version in versions])
            for port, key in self._sized
            if port.rows != "joint"
        }

    def _run_bank(
        self, inputs: Mapping[str, Array], versions: Sequence[Version], options: onnxruntime.RunOptions | None
    ) -> dict[str, Array]:
        bank, rows = self._residency.rows(versions, self._component)
        with translated(self._manifest.name):
            return self._banked.run(bank, inputs, np.array(rows, np.int64), options)

    def _in_parts(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version],
        parts: Sequence[Sequence[Version]],
        options: onnxruntime.RunOptions | None,
        *,
        held: bool = False,
    ) -> Outputs:
        """One run for each part of the versions, and the rows put back into their order."""
        gathered = requests.Gathered(self._manifest.outputs, len(versions))
        for part in parts:
            chosen = np.flatnonzero([version in part for version in versions])
            rows = requests.take_rows(self._manifest, inputs, chosen)
            own = [version for version in versions if version in part]
            gathered.put(chosen, self.run_rows(rows, own, options, held=held))
        return gathered.whole()


@contextmanager
def translated(bundle: str) -> Iterator[None]:
    """ONNX Runtime's exceptions, which share no base class, as errors of the toolkit."""
    try:
        yield
    except (*ORT_ERRORS, RuntimeError) as error:  # with IO binding it raises plain RuntimeErrors
        text = str(error).strip().splitlines()[0]
        # What it refuses in the middle of a run is mostly an index out of range: no shape or dtype gets this far.
        kind = InputError if isinstance(error, ORT_REFUSALS) or _OUT_OF_RANGE in text else RunError
        raise kind(f"run bundle {bundle!r}", problem=text.rpartition("Status Message: ")[2][:300]) from error

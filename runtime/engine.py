"""Running rows on versions: on a session of their own where there is one, else together on the bank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import CapacityError, InputError, RunError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.adapters.residency import Tiers
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, ORT_REFUSALS
from tpeft_deploy.tucker import Array

__all__ = ["Engine", "Outputs"]

Outputs = dict[str, Array | list[Array]]
_OUT_OF_RANGE = "out of data bounds"  # in what Gather says, whatever class its exception has


class Banked(Protocol):
    """A session of the banked graph."""

    def run(
        self,
        bank: Bank,
        inputs: Mapping[str, Array],
        index: Array,
        options: onnxruntime.RunOptions | None = None,
    ) -> dict[str, Array]:
        """Run rows of a batch on rows of a bank."""
        ...


class Whole(Protocol):
    """A session whose weights are one version's."""

    def run(self, inputs: Mapping[str, Array], options: onnxruntime.RunOptions | None = None) -> dict[str, Array]:
        """Run a batch."""
        ...


class Sessions(Protocol):
    """Versions that have folded sessions; None is the base."""

    def find(self, version: Version | None, rows: int) -> Whole | None:
        """The session for this many rows of a version, if it has one."""
        ...


class Engine:
    """Answers batches; safe to use from several threads.

    Args:
        manifest: manifest of the bundle.
        banked: the session that serves all.
        tiers: residency of the versions.
        own: the sessions of the base and of hot versions.
        sizes: output -> size of its varying axis for the base.
    """

    def __init__(
        self, manifest: Manifest, banked: Banked, tiers: Tiers, own: Sessions, sizes: Mapping[str, int]
    ) -> None:
        self._manifest = manifest
        self._banked = banked
        self._tiers = tiers
        self._own = own
        self._sizes = sizes

    def run_one(
        self,
        inputs: Mapping[str, Array],
        version: Version | None,
        options: onnxruntime.RunOptions | None = None,
    ) -> dict[str, Array]:
        """All rows on one version; None is the base.

        Raises:
            AdapterError, BundleError, CapacityError: it cannot be brought to the device.
        """
        whole = self._own.find(version, requests.rows(self._manifest, inputs))
        if whole is None:
            return self.run_banked(inputs, version, options)
        with _translated(self._manifest.name):
            return whole.run(inputs, options)

    def run_banked(
        self,
        inputs: Mapping[str, Array],
        version: Version | None,
        options: onnxruntime.RunOptions | None = None,
    ) -> dict[str, Array]:
        """As `run_one`, on the bank even where there is a folded session."""
        with self._tiers.using([] if version is None else [version]):
            bank, rows = self._tiers.rows([version])
            with _translated(self._manifest.name):
                outputs = self._banked.run(bank, inputs, np.array(rows, np.int64), options)
            sizes = self._sizes if version is None else version.sizes
        ports = self._manifest.outputs
        return {port.name: requests.cut(port, outputs[port.name], sizes.get(port.name, 0)) for port in ports}

    def run_rows(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version | None],
        options: onnxruntime.RunOptions | None = None,
    ) -> Outputs:
        """Each row on the version of its task; None is the base.

        Returns:
            Output name -> array, or a list with one array a row where the output's size varies per task; without the
            outputs that depend on the batch as a whole, where versions differ.

        Raises:
            AdapterError, BundleError, CapacityError: one of them cannot be brought to the device.
        """
        distinct = list(dict.fromkeys(versions))
        if len(distinct) == 1:
            outputs = self.run_one(inputs, distinct[0], options)
            return {port.name: requests.as_rows(port, outputs[port.name]) for port in self._manifest.outputs}
        if self._manifest.rows == "group":
            return self._in_parts(inputs, versions, [[version] for version in distinct], options)
        try:
            with self._tiers.using(version for version in distinct if version is not None):
                return self._on_rows(inputs, versions, options)
        except CapacityError:
            # Fewer at a time may fit; one that does not fit alone raises again.
            half = (len(distinct) + 1) // 2
            return self._in_parts(inputs, versions, [distinct[:half], distinct[half:]], options)

    def run_held(
        self, inputs: Mapping[str, Array], versions: Sequence[Version | None], options: onnxruntime.RunOptions
    ) -> Outputs:
        """As `run_rows`, of versions that are on the device and in use: never waits."""
        first = versions[0]
        if self._manifest.rows == "group" or versions.count(first) == len(versions):
            return self.run_rows(inputs, versions, options)
        return self._on_rows(inputs, versions, options)

    def _on_rows(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version | None],
        options: onnxruntime.RunOptions | None,
    ) -> Outputs:
        """Versions that are in use, together on the bank."""
        bank, rows = self._tiers.rows(versions)
        with _translated(self._manifest.name):
            outputs = self._banked.run(bank, inputs, np.array(rows, np.int64), options)
        sizes = [self._sizes if version is None else version.sizes for version in versions]
        return {
            port.name: requests.cut_rows(port, outputs[port.name], [own.get(port.name, 0) for own in sizes])
            for port in self._manifest.outputs
            if port.rows != "joint"
        }

    def _in_parts(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version | None],
        parts: Sequence[Sequence[Version | None]],
        options: onnxruntime.RunOptions | None,
    ) -> Outputs:
        """One run for each part of the versions, and the rows put back into their order."""
        gathered = requests.Gathered(self._manifest.outputs, len(versions))
        for part in parts:
            chosen = np.flatnonzero([version in part for version in versions])
            own = requests.take_rows(self._manifest, inputs, chosen)
            gathered.put(chosen, self.run_rows(own, [version for version in versions if version in part], options))
        return gathered.whole()


@contextmanager
def _translated(bundle: str) -> Iterator[None]:
    """ONNX Runtime's exceptions, which share no class of their own, as errors of the toolkit."""
    try:
        yield
    except (*ORT_ERRORS, RuntimeError) as error:  # with IO binding it raises plain RuntimeErrors
        text = str(error).strip().splitlines()[0]
        # What it refuses in the middle of a run is mostly an index out of range: no shape or dtype gets this far.
        kind = InputError if isinstance(error, ORT_REFUSALS) or _OUT_OF_RANGE in text else RunError
        raise kind(f"run bundle {bundle!r}", problem=text.rpartition("Status Message: ")[2][:300]) from error

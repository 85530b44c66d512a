"""Rows of different lengths in one run: cut from longer ones, filled up to the longest, and cut back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.exporters.oracle.base import Inputs, Outputs
from tpeft_deploy.exporters.oracle.subject import Sizes, Subject
from tpeft_deploy.tucker import Array

__all__ = ["STEPS", "Batch", "Ragged"]

STEPS = (1, 7)  # how much longer rows are made
_EACH = 2  # rows of each length: a single one may be taken for a constant


@dataclass(frozen=True)
class Batch:
    """One run.

    Args:
        sizes: all free sizes, to which its rows are filled up.
        groups: the sizes that its rows have alone, two rows of each.
    """

    sizes: Sizes
    groups: tuple[Sizes, ...]


class Ragged:
    """Two rows of a base's example at every length, alone and filled up.

    Args:
        subject: base that gives the example, and is tried at other lengths.
        manifest: states the free sizes along which rows are filled up, and the values.
    """

    def __init__(self, subject: Subject, manifest: Manifest) -> None:
        self._manifest = manifest
        self._names = sorted(manifest.paddable)
        self._batch = manifest.batch_axis
        self._subject = subject
        self.own = subject.example_sizes | self._rows_of(1)
        self.longer = [self.own | {name: self.own[name] + step for name in self._names} for step in STEPS]
        self._whole = subject.inputs(self.longer[-1])

    def batches(self) -> list[Batch]:
        """Batches to run: rows of one length, and at last rows of every length that any batch has."""
        groups = [self.own, self.longer[-1]]
        for turn in range(4):
            # Each name at another of its lengths, so that one is filled up where another is whole.
            lengths = {name: _lengths(self.own[name])[(turn + i) % 4] for i, name in enumerate(self._names)}
            sizes = self.own | lengths
            if sizes not in groups and self._subject.takes(sizes):
                groups.append(sizes)
        alike = [Batch(sizes, (self.own,)) for sizes in self.longer]
        return [*alike, Batch(self.longer[-1] | self._rows_of(len(groups)), tuple(groups))]

    def rows(self, sizes: Sizes) -> Inputs:
        """Two rows alone, at any lengths up to the longest."""
        return {port.name: self._shortened(self._whole[port.name], port, sizes) for port in self._manifest.inputs}

    def filled(self, sizes: Sizes, target: Sizes) -> Inputs:
        """The rows of `sizes`, filled up to those of `target`."""
        inputs = dict(self.rows(sizes))
        for port in self._manifest.inputs:
            if port.pad is not None:
                array = inputs[port.name]
                more = [
                    (0, target[str(size)] - own if size in self._names else 0)
                    for size, own in zip(port.shape, array.shape, strict=True)
                ]
                inputs[port.name] = np.pad(array, more, constant_values=port.pad)
        return inputs

    def joined(self, batch: Batch) -> Inputs:
        """All rows of a batch, filled up to its sizes."""
        parts = [self.filled(sizes, batch.sizes) for sizes in batch.groups]
        return {
            port.name: np.concatenate([part[port.name] for part in parts])
            if self._has_rows(port)
            else parts[0][port.name]
            for port in self._manifest.inputs
        }

    def cut_back(self, outputs: Mapping[str, Array], batch: Batch, place: int) -> Outputs:
        """Outputs of one of a batch's groups, cut to its lengths."""
        rows = slice(place * _EACH, (place + 1) * _EACH)
        found = {}
        for port in self._manifest.outputs:
            if port.name in outputs:
                mine = outputs[port.name][rows] if self._has_rows(port) else outputs[port.name]
                found[port.name] = self._shortened(mine, port, batch.groups[place])
        return found

    def _rows_of(self, groups: int) -> Sizes:
        return {self._batch: _EACH * groups} if self._batch is not None else {}

    def _has_rows(self, port: Port) -> bool:
        return port.shape[:1] == (self._batch,)

    def _shortened(self, array: Array, port: Port, sizes: Sizes) -> Array:
        names: Collection[int | str] = self._names
        cut: Array = array[tuple(slice(sizes[str(size)]) if size in names else slice(None) for size in port.shape)]
        return cut


def _lengths(own: int) -> tuple[int, int, int, int]:
    return own + STEPS[-1], own, max(own - 1, 1), (own + 1) // 2

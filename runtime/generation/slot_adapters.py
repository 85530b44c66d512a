"""Adapters in slots: a row of a bank for each slot, next to each other in the order of the slots."""

from __future__ import annotations

import numpy as np
import onnxruntime

from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.tucker import Array

__all__ = ["SlotAdapters"]


class SlotAdapters:
    """Copies of rows of a bank in host memory; a slot without a version has zeros or an earlier one.

    Args:
        slots: number of slots.
    """

    def __init__(self, slots: int) -> None:
        self._versions: list[Version | None] = [None] * slots
        self._bank: Bank | None = None
        self._arrays: dict[str, Array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(array.nbytes for array in self._arrays.values())

    def place(self, bank: Bank, slot: int, version: Version, row: int) -> None:
        """Copy a version to a slot, unless that has it.

        Args:
            bank: bank that has the version.
            slot: slot.
            version: version, acquired.
            row: row of the bank.
        """
        if bank is not self._bank:  # other ranks
            count = len(self._versions)
            self._versions = [None] * count
            self._arrays = {
                name: np.zeros((count, *shape), bank.layout.defaults[name].dtype) for name, shape in bank.shapes.items()
            }
            self._bank = bank
        if self._versions[slot] is version:
            return
        self._versions[slot] = None  # until all of it is there
        for name, array in self._arrays.items():
            array[slot] = device_rows.read(device_rows.row_view(bank.values[name], row))
        self._versions[slot] = version

    def bind(self, binding: onnxruntime.IOBinding, first: int, rows: int) -> None:
        """Bind the versions of slots.

        Args:
            binding: binding of a session.
            first: slot of the first row.
            rows: number of rows.
        """
        for name, array in self._arrays.items():
            own = array[first : first + rows]
            binding.bind_input(name, "cpu", 0, own.dtype.type, own.shape, own.ctypes.data)

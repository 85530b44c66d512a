"""Rows of banks that are copied to slots."""

from __future__ import annotations

from typing import cast

import numpy as np

from tpeft_deploy.runtime.adapters.bank import Bank, Layout
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.generation.slot_adapters import SlotAdapters

A, B = (cast(Version, object()) for _ in range(2))


def bank_of(rank: int) -> Bank:
    bank = Bank.allocate(Layout({"down": np.zeros((2, 1), np.float32)}), {"down": (2, rank)}, 3, "cpu")
    for row in (1, 2):
        bank.write(row, {"down": np.full((2, rank), row, np.float32)})
    return bank


def test_a_slot_gets_a_version_once() -> None:
    bank, adapters = bank_of(3), SlotAdapters(4)
    assert adapters.nbytes == 0
    adapters.place(bank, 2, A, 1)
    adapters.place(bank, 0, B, 2)
    assert adapters.nbytes == 4 * 2 * 3 * 4
    assert [part[0, 0] for part in adapters._arrays["down"]] == [2, 0, 1, 0]
    bank.write(1, {"down": np.full((2, 3), 7, np.float32)})
    adapters.place(bank, 2, A, 1)
    assert adapters._arrays["down"][2, 0, 0] == 1
    adapters.place(bank, 2, B, 2)
    assert adapters._arrays["down"][2, 0, 0] == 2


def test_another_bank_brings_all_versions_anew() -> None:
    adapters = SlotAdapters(2)
    for slot in range(2):
        adapters.place(bank_of(3), slot, A, 1)
    wider = bank_of(5)
    adapters.place(wider, 1, A, 1)
    assert [part.tolist() for part in adapters._arrays["down"]] == [[[0] * 5] * 2, [[1] * 5] * 2]

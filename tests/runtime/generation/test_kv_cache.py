"""Caches of slots: the same bytes in host memory and in a device's, and how many slots there are."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from tests.helpers.runtime.manifests import manifest
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import CapacityError, RunError
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.generation.kv_cache import CacheBlock, DeviceCaches, HostCaches, KvCaches, KvPlan

PLAN = KvPlan(3, 7, {"k": (2, 7, 4), "v": (1, 7, 8)}, {"k": "float32", "v": "bfloat16"})


def whole(caches: KvCaches) -> list[np.ndarray]:
    blocks = [caches.save(slot, 0, PLAN.length) for slot in range(PLAN.slots)]
    return [np.stack([block.parts[index] for block in blocks]) for index in range(2)]


@pytest.mark.parametrize("make", [HostCaches, lambda plan: DeviceCaches(plan, "cpu")])
def test_copies_change_what_they_name_and_nothing_else(make: type[HostCaches]) -> None:
    caches, draw = make(PLAN), np.random.default_rng(0)
    model = [np.zeros((PLAN.slots, *shape), PLAN.stored(name)) for name, shape in PLAN.shapes.items()]
    for slot in range(PLAN.slots):
        parts = [draw.integers(9000, size=array.shape[1:]).astype(array.dtype) for array in model]
        caches.restore(slot, 0, CacheBlock(parts))
        for array, part in zip(model, parts, strict=True):
            array[slot] = part
    caches.move(2, 0, 5)
    block = caches.save(1, 2, 3)
    assert block.nbytes == 3 * (8 * 4 + 8 * 2)
    caches.move(0, 1, 7)
    caches.restore(2, 4, block)
    for array in model:
        array[0, :, :5] = array[2, :, :5]
        kept = array[1, :, 2:5].copy()
        array[1] = array[0]
        array[2, :, 4:7] = kept
    for own, array in zip(whole(caches), model, strict=True):
        np.testing.assert_array_equal(own, array)


def test_a_part_of_a_value_lies_within_it() -> None:
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(device_rows.read(device_rows.part_view(value, 1, (2, 2))), [[1, 2], [3, 4]])
    for offset, shape in ((-1, (1,)), (5, (2,)), (0, (7,))):
        with pytest.raises(RunError, match="view a part"):
            device_rows.part_view(value, offset, shape)


def of_model(heads: int, positions: int) -> Manifest:
    shape = ("rows", heads, "buffer", 64)
    made = manifest((Port("past", "float32", shape),), (Port("present", "float32", shape),))
    ports = DecoderPorts("input_ids", "seqlens", "logits", (("past", "present"),), positions, 50)
    return Manifest(**{**vars(made), "decoder": ports})


@pytest.mark.parametrize(
    ("heads", "positions", "kv_bytes", "slots", "length"),
    [
        (1, 100, None, 8, 100),
        (1, 9999, None, 8, 2048),
        (200, 9999, None, 2, 2048),  # 105 MB each
        (9000, 9999, None, 1, 2048),
        (1, 100, 5 * 100 * 256, 5, 100),
        (1, 100, 6 * 100 * 256 - 1, 5, 100),
    ],
)
def test_the_number_of_slots_follows_the_budget(
    heads: int, positions: int, kv_bytes: int | None, slots: int, length: int
) -> None:
    plan = KvPlan.of(of_model(heads, positions), kv_bytes, None)
    assert (plan.slots, plan.length) == (slots, length)
    assert plan.nbytes == slots * length * heads * 256


def test_a_budget_without_room_for_a_slot_is_refused() -> None:
    with pytest.raises(CapacityError, match="25,600 bytes, got kv_bytes of 25,599"):
        KvPlan.of(of_model(1, 100), 25_599, None)

"""Caches of slots: the same bytes in host memory and in a device's, and how many slots there are."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import onnxruntime
import pytest

from tests.helpers.runtime.manifests import manifest
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import CapacityError, InputError, RunError
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


@pytest.mark.parametrize("make", [HostCaches, lambda plan: DeviceCaches(plan, "cpu")])
def test_memory_moves_with_its_slot(make: type[HostCaches]) -> None:
    plan = KvPlan(3, 7, PLAN.shapes, {**PLAN.dtypes, "cross": "float32"}, {"cross": (2, 5, 4)})
    assert plan.nbytes == PLAN.nbytes + 3 * 2 * 5 * 4 * 4
    caches, draw = make(plan), np.random.default_rng(0)
    assert caches.filled.tolist() == [1, 1, 1]
    parts = {slot: draw.standard_normal((2, size, 4)).astype(np.float32) for slot, size in ((0, 5), (2, 3))}
    for slot, part in parts.items():
        caches.fill(slot, [part])
    caches.move(2, 1, 4)
    caches.move(0, 2, 0)
    assert caches.filled.tolist() == [5, 3, 5]
    model = np.zeros((3, 2, 5, 4), np.float32)
    model[0] = model[2] = parts[0]
    model[1, :, :3] = parts[2]
    np.testing.assert_array_equal(memory_of(caches, "cross", model.shape), model)
    for size in (0, 6):
        with pytest.raises(InputError, match=f"expected 1 to 5 positions, got {size}.*max_source"):
            caches.fill(0, [np.zeros((2, size, 4), np.float32)])


def memory_of(caches: KvCaches, name: str, shape: tuple[int, ...]) -> np.ndarray:
    memory = (ctypes.c_float * math.prod(shape)).from_address(caches._address(name))
    found: np.ndarray = np.ctypeslib.as_array(memory).reshape(shape)
    return found


@pytest.mark.parametrize(
    ("own", "of_source", "wanted", "size"),
    [("source", "sequence", None, 512), ("source", "sequence", 40, 40), ("source", 30, None, 30), (30, 30, 30, 30)],
)
def test_the_source_has_the_models_size_where_that_is_fixed(
    own: int | str, of_source: int | str, wanted: int | None, size: int
) -> None:
    plan = KvPlan.of(with_memory(own), 10**6, 10, wanted, encoder(of_source))
    assert plan.source == size
    assert plan.memory == {"cross": (3, size, 8)}
    assert plan.nbytes == plan.slots * (10 * 256 + 3 * size * 8 * 4)


@pytest.mark.parametrize(("of_source", "wanted"), [("sequence", 0), (30, 31), (30, 8)])
def test_a_source_of_another_size_is_refused(of_source: int | str, wanted: int) -> None:
    with pytest.raises(InputError, match=f"expected max_source of .*, got {wanted}"):
        KvPlan.of(with_memory("source"), None, None, wanted, encoder(of_source))


def test_a_source_has_no_more_positions_than_its_encoder() -> None:
    limited = with_memory("source", 48)
    assert KvPlan.of(limited, 10**6, 10, None, encoder("sequence")).source == 48
    with pytest.raises(InputError, match="expected max_source of 1 to 48, got 49"):
        KvPlan.of(limited, None, None, 49, encoder("sequence"))


def with_memory(size: int | str, limit: int | None = None) -> Manifest:
    made = of_model(1, 100)
    ports = {**vars(made.decoder), "memory": ("cross",), "source": "encoder", "source_outputs": ("key",)}
    ports["source_positions"] = limit
    inputs = (*made.inputs, Port("cross", "float32", ("rows", 3, size, 8)))
    return Manifest(**{**vars(made), "inputs": inputs, "decoder": DecoderPorts(**ports)})


def encoder(size: int | str) -> Manifest:
    return manifest((), (Port("states", "float32", ("batch", 9, 9)), Port("key", "float32", ("batch", 3, size, 8))))


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

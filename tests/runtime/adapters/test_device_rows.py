from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.adapters.device_rows import DTYPES, allocate, dtype_of, row_view, write
from tpeft_deploy.tucker import Array

ROOT = Path(__file__).parents[3]
NAMES = [str(dtype) for name, dtype in DTYPES.items() if name != "tensor(bfloat16)"]


def numbers(dtype: str, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


def filled(array: Array) -> onnxruntime.OrtValue:
    value = allocate(array.shape, str(array.dtype), "cpu")
    write(value, array)
    return value


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("row", [0, 2, 4])
@pytest.mark.parametrize("dtype", NAMES)
def test_a_row_is_written_and_no_other(dtype: str, row: int) -> None:
    before, new = numbers(dtype, 5, 3, 7), numbers(dtype, 3, 7, seed=1)
    bank = filled(before)
    view = row_view(bank, row)
    assert (view.shape(), view.data_type(), view.device_name()) == ([3, 7], bank.data_type(), "cpu")
    np.testing.assert_array_equal(view.numpy(), before[row])
    write(view, new)
    expected = before.copy()
    expected[row] = new
    np.testing.assert_array_equal(bank.numpy(), expected)


def test_bfloat16_is_written_as_its_bits() -> None:
    bank = allocate((3, 4), "bfloat16", "cpu")
    assert dtype_of(bank) == np.uint16
    write(bank, numbers("uint16", 3, 4))
    view = row_view(bank, 1)
    assert view.data_type() == "tensor(bfloat16)"
    write(view, numbers("uint16", 4, seed=1))
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * 12).from_address(bank.data_ptr())).reshape(3, 4)
    expected = numbers("uint16", 3, 4)
    expected[1] = numbers("uint16", 4, seed=1)
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("shape", [(3,), (3, 0, 2), (1, 5), (2, 1, 1, 1)])
def test_unusual_shapes(shape: tuple[int, ...]) -> None:
    before = numbers("float32", *shape)
    bank = filled(before)
    view = row_view(bank, shape[0] - 1)
    assert tuple(view.shape()) == shape[1:]
    write(view, np.full(shape[1:], 7, np.float32))
    before[-1] = 7
    np.testing.assert_array_equal(bank.numpy(), before)


def test_a_view_of_a_view() -> None:
    before = numbers("float32", 3, 4, 5)
    bank = filled(before)
    write(row_view(row_view(bank, 1), 2), np.zeros(5, np.float32))
    before[1, 2] = 0
    np.testing.assert_array_equal(bank.numpy(), before)


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_rows_that_are_not_there(row: int) -> None:
    with pytest.raises(RunError, match=rf"expected a row of 0..2, got row {row} of shape \[3, 2\]"):
        row_view(filled(numbers("float32", 3, 2)), row)


def test_a_bank_without_rows() -> None:
    with pytest.raises(RunError, match="a bank with rows"):
        row_view(allocate((0, 3), "float32", "cpu"), 0)
    with pytest.raises(RunError, match="a bank with rows"):
        row_view(filled(numbers("float32")), 0)


@pytest.mark.parametrize(
    "array",
    [
        numbers("float64", 3, 4),
        numbers("int32", 3, 4),  # as many bytes
        numbers("int8", 3, 4),  # fewer: memory after its end would be read
        numbers("float32", 4, 3),
        numbers("float32", 12),
        numbers("float32", 3, 5),
        numbers("float32", 4, 3).T,
        numbers("float32", 3, 8)[:, ::2],
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_written(array: Array) -> None:
    before = numbers("float32", 2, 3, 4)
    bank = filled(before)
    with pytest.raises(RunError, match=r"expected a contiguous float32 array of shape \[3, 4\], got "):
        write(row_view(bank, 1), array)
    np.testing.assert_array_equal(bank.numpy(), before)


@pytest.mark.parametrize("owner", ["onnxruntime", "numpy"])
def test_a_view_keeps_its_bank_alive(owner: str) -> None:
    array = np.full((20, 200_000), 7, np.float32)
    bank = filled(array) if owner == "onnxruntime" else onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu", 0)
    view = row_view(bank, 19)
    del bank, array
    gc.collect()
    others = [np.zeros((20, 200_000), np.float32) for _ in range(3)]
    np.testing.assert_array_equal(view.numpy(), np.full(200_000, 7, np.float32))
    assert others


def alone(function: Callable[[], None]) -> None:
    """Call a function of this module in a process of its own, whose memory is nobody else's."""
    code = f"from tests.runtime.adapters.test_device_rows import {function.__name__}; {function.__name__}()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)


def make_many_views() -> None:
    bank = filled(numbers("float32", 8, 64))
    for row in range(2_000):
        row_view(bank, row % 8)
    before = resident_bytes()
    for row in range(100_000):
        row_view(bank, row % 8)
    assert resident_bytes() - before < 2**20  # 10 bytes a view


def test_views_leave_nothing_behind() -> None:
    alone(make_many_views)


def test_the_memory_goes_with_the_last_view() -> None:
    alone(make_large_banks)


def make_large_banks() -> None:
    size = 64 * 2**20
    before = resident_bytes()
    for _ in range(10):
        bank = allocate((4, size // 16), "float32", "cpu")
        write(bank, np.ones((4, size // 16), np.float32))
        view = row_view(bank, 3)
        del bank
        assert view.numpy()[-1] == 1
        del view
    assert resident_bytes() - before < 2 * size


def test_a_session_bound_to_the_bank_sees_the_row() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]> g (float[T,3] bank, int64[B] ids) => (float[B,3] y) '
        "{y = Gather(bank, ids)}"
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    before = numbers("float32", 4, 3)
    bank = filled(before)
    binding = session.io_binding()
    binding.bind_ortvalue_input("bank", bank)
    binding.bind_cpu_input("ids", np.array([3, 2, 1, 0]))
    binding.bind_output("y", "cpu")
    for row in (0, 3):
        write(row_view(bank, row), np.full(3, -row, np.float32))
        before[row] = -row
        session.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], before[::-1])

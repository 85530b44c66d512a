"""A row of a bank on the device as a separate value, so that one adapter is written without touching the others.

ONNX Runtime has no call that writes part of a tensor.  It does hand out tensors by DLPack, and takes them back, without
copying, on the CPU and on CUDA alike: the tensor that it hands out is narrowed to one row on the way.  What keeps the
memory alive stays in ONNX Runtime, so no Python code runs when a view goes.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.tucker import Array

__all__ = ["DTYPES", "allocate", "allocate_as", "copy", "dtype_of", "part_view", "read", "row_view", "write"]

# Numpy has no bfloat16: its bits travel as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(bool)": np.dtype(np.bool_),
}

_BFLOAT16 = 16  # ONNX's number of the type


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor, which is also the beginning of its DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype = ctypes.c_void_p
_pointer_in.argtypes = (ctypes.py_object, ctypes.c_char_p)


def allocate(shape: Sequence[int], dtype: str, device: str) -> onnxruntime.OrtValue:
    """An uninitialised tensor in ONNX Runtime's memory.

    Args:
        shape: its sizes.
        dtype: numpy's name, or "bfloat16".
        device: "cpu", "cuda" or "cuda:1".
    """
    return allocate_as(shape, _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type, device)


def allocate_as(shape: Sequence[int], kind: int | type, device: str) -> onnxruntime.OrtValue:
    """As `allocate`, of what `OrtValue.element_type` gives, or of a numpy type."""
    with device_lock.using(device):
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, *device_lock.place(device))


def row_view(bank: onnxruntime.OrtValue, row: int) -> onnxruntime.OrtValue:
    """One row of a bank, in the bank's memory.

    Args:
        bank: (T, ...) on any device.
        row: from 0 to T - 1.

    Returns:
        A value of shape `bank.shape()[1:]`, which keeps the bank alive.

    Raises:
        RunError: the bank has no such row.
    """
    shape = bank.shape()
    row = operator.index(row)
    if not shape or not 0 <= row < shape[0]:
        rows = f"a row of 0..{shape[0] - 1}" if shape and shape[0] else "a bank with rows"
        raise RunError("view a row of a bank", expected=rows, got=f"row {row} of shape {list(shape)}")
    capsule = _capsule(bank)
    tensor = _Tensor.from_address(_pointer_in(capsule, b"dltensor"))
    tensor.data = bank.data_ptr() + row * math.prod(shape[1:]) * dtype_of(bank).itemsize
    tensor.ndim -= 1
    # The sizes stay where ONNX Runtime keeps them, in the bank's value, which the capsule holds.
    tensor.shape = _rest(tensor.shape)
    if tensor.strides:
        tensor.strides = _rest(tensor.strides)
    view = _value(capsule)
    # A bank made from a numpy array does not own its memory; its Python object does.
    view.bank = bank
    return view


def part_view(value: onnxruntime.OrtValue, offset: int, shape: Sequence[int]) -> onnxruntime.OrtValue:
    """Consecutive elements of a value, in its memory.

    Args:
        value: on any device.
        offset: first element, counted from the beginning.
        shape: sizes of the view.

    Returns:
        A value of that shape, which keeps the other alive.

    Raises:
        RunError: the value has not so many elements.
    """
    if offset < 0 or offset + math.prod(shape) > math.prod(value.shape()):
        raise RunError("view a part of a value", expected=f"a part of {value.shape()}", got=f"{shape} from {offset}")
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    capsule = _capsule(value)
    tensor = _Tensor.from_address(_pointer_in(capsule, b"dltensor"))
    tensor.data = value.data_ptr() + offset * dtype_of(value).itemsize
    tensor.ndim = len(shape)
    tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = None
    view = _value(capsule)  # copies the sizes
    view.whole = value
    return view


def read(view: onnxruntime.OrtValue) -> Array:
    """Return a copy of a value in host memory."""
    with device_lock.using(view.device_name()):
        array: Array = np.array(view.numpy())
    return array


def copy(view: onnxruntime.OrtValue, source: onnxruntime.OrtValue) -> None:
    """Copy a value into another of the same device, dtype and shape, without the host."""
    with device_lock.using(view.device_name()):
        view.update_inplace(source)


def dtype_of(value: onnxruntime.OrtValue) -> np.dtype[Any]:
    """The numpy dtype that a value is written from; uint16 for bfloat16.

    Raises:
        RunError: numpy has none for it.
    """
    dtype = DTYPES.get(value.data_type())
    if dtype is None:
        raise RunError("write to a value", expected=f"one of {', '.join(DTYPES)}", got=value.data_type())
    return dtype


def write(view: onnxruntime.OrtValue, array: Array) -> None:
    """Copy an array into a value in place; the value keeps its address.

    ONNX Runtime itself compares only the number of elements: bytes of another dtype are reinterpreted, and memory
    after the array's end is read.

    Args:
        view: on any device.
        array: C-contiguous, of the value's dtype and shape; uint16 for bfloat16.

    Raises:
        RunError: the array does not fit; nothing was written.
    """
    dtype, shape = dtype_of(view), tuple(view.shape())
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        layout = "contiguous" if array.flags.c_contiguous else "not contiguous"
        raise RunError(
            "write to a value",
            expected=f"a contiguous {dtype} array of shape {list(shape)}",
            got=f"{array.dtype} {list(array.shape)}, {layout}",
        )
    if array.size:
        with device_lock.using(view.device_name()):
            view.update_inplace(array)


# ONNX Runtime 1.24, which OpenVINO's package holds, has both calls only below its Python classes.
def _capsule(value: onnxruntime.OrtValue) -> object:
    return value._ortvalue.__dlpack__()


def _value(capsule: object) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue(ort.OrtValue.from_dlpack(capsule))


def _rest(numbers: ctypes._Pointer[ctypes.c_int64]) -> ctypes._Pointer[ctypes.c_int64]:
    address = ctypes.addressof(numbers.contents) + ctypes.sizeof(ctypes.c_int64)
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))

"""Weights in 8 or 4 bits: which ones are quantised, and what ONNX Runtime's quantiser makes of them.

Products get blocks of 32 inputs with a scale each and no zero points, the layout of MatMulNBits; the kernels of
convolutions, in 8 bits only, a scale for every output channel, the layout of DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxruntime.capi import onnxruntime_pybind11_state as ort_kernels

from tpeft_deploy.bundle.manifest import Weight
from tpeft_deploy.bundle.quantised import Activations, Quantise
from tpeft_deploy.errors import ExportError, UnsupportedBase
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.graph.weight_uses import conv_sites, linear_sites
from tpeft_deploy.exporters.graph.weights_and_shapes import ALIGNMENT, held_tensor
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.oracle.bfloat16 import HALVES
from tpeft_deploy.tucker import Array

__all__ = ["BLOCK", "BITS", "Quantisation", "Pack", "choice_of", "lay_out_packs", "pack_weights", "quantisable"]

BLOCK = 32
BITS: Mapping[Quantise, int] = {"int8": 8, "int4": 4}
_ACTIVATIONS = ("int8", "float")
_KERNEL_BITS = 8
_LARGEST = 127  # of 8 bits, so that zero is exact


@dataclass(frozen=True)
class Quantisation:
    """Quantisation that an export was asked for."""

    form: Quantise
    activations: Activations


@dataclass(frozen=True, eq=False)
class Pack:
    """A quantised weight.

    Args:
        bits: 8 or 4.
        codes: uint8 (O, blocks, bytes of a block) for a product, int8 in the shape of the kernel for a convolution.
        scales: float32, (O, blocks) for a product, (O,) for a convolution.
        value: float32 array that codes and scales stand for, in the shape of the initializer.
        turned: whether a product uses the transposed weight: it is (O, I), not (I, O).
        digest: `weight_digest` of the weight before it was quantised.
    """

    bits: int
    codes: Array
    scales: Array
    value: Array
    digest: str
    turned: bool = True

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs of a product."""
        outputs, inputs = self.value.shape if self.turned else self.value.shape[::-1]
        return outputs, inputs

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)

    @property
    def is_product(self) -> bool:
        """Whether it is the matrix of a product."""
        return self.value.ndim == 2

    def tensors(self, name: str) -> dict[str, Array]:
        """Initializers of a graph that uses the weight `name`, by their names."""
        return {f"{name}.int{self.bits}": self.codes, f"{name}.scales": self.scales}


def choice_of(quantise: str | None, activations: str, doing: str) -> Quantisation | None:
    """Check the options of an export.

    Raises:
        ExportError: one has another value than its type allows.
    """
    if quantise is not None and quantise not in BITS:
        raise ExportError(doing, expected=f"quantise as one of {', '.join(BITS)}", got=repr(quantise))
    if activations not in _ACTIVATIONS:
        raise ExportError(doing, expected=f"activations as one of {', '.join(_ACTIVATIONS)}", got=repr(activations))
    return Quantisation(quantise, activations) if quantise is not None else None  # type: ignore[arg-type]


def quantisable(
    graph: ir.Graph, resolved: Mapping[str, str], choice: Quantisation, *, base: Base, skip: Collection[str]
) -> list[str]:
    """Initializers that can be quantised: used in products alone, or for 8 bits as kernels of convolutions alone.

    Args:
        graph: prepared graph without branches.
        resolved: weight -> initializer that holds it.
        choice: form of quantisation.
        base: base of the graph; tied weights stay as they are.
        skip: further initializers that stay as they are.

    Raises:
        UnsupportedBase: the base is quantised already, or not in float32.
    """
    doing = f"quantise {base.name} to {choice.form}"
    if any(True for _ in quantised.products(graph)):
        raise UnsupportedBase(doing, expected="weights in floating point", got="a base that is quantised already")
    tied = {resolved[name] for group in base.ties for name in group if name in resolved}
    names = sorted(set(resolved.values()))
    dtypes = {graph.initializers[name].dtype for name in names if name in graph.initializers}
    halves = [dtype for dtype in HALVES if dtype in dtypes]
    if halves:
        raise UnsupportedBase(
            doing,
            expected="weights in float32",
            got=", ".join(dtype.name.lower() for dtype in halves),
            fix="Load it in float32 (module.float(), dtype=torch.float32).",
        )
    found = []
    for name in names:
        value = graph.initializers.get(name)
        if value is None or value.dtype != ir.DataType.FLOAT or value.const_value is None:
            continue
        if name in tied or name in skip:
            continue
        if _is_product(value) or (BITS[choice.form] == _KERNEL_BITS and _is_kernel(value)):
            found.append(name)
    return found


def pack_weights(
    graph: ir.Graph, names: Iterable[str], choice: Quantisation, digests: Mapping[str, str]
) -> dict[str, Pack]:
    """Quantise initializers of a graph, which is left as it is.

    Args:
        graph: holds the initializers, in float32.
        names: result of `quantisable`.
        choice: form of quantisation.
        digests: initializer -> `weight_digest` of its value.
    """
    packs = {}
    for name in names:
        value, array = graph.initializers[name], held_tensor(graph, name).numpy()
        if array.ndim > 2:
            packs[name] = _kernel(array, digests[name])
        else:
            packs[name] = _matrix(array, BITS[choice.form], digests[name], turned=_uses(value) == {"linear"})
    return packs


def lay_out_packs(packs: Mapping[str, Pack], end: int) -> dict[str, Weight]:
    """Lay out the tensors of packs in a file, one after another: tensor -> its place.

    Args:
        packs: initializer -> pack.
        end: bytes that the file has already.
    """
    places = {}
    for name, pack in packs.items():
        for tensor, array in pack.tensors(name).items():
            start = end + -end % ALIGNMENT
            end = start + array.nbytes
            places[tensor] = Weight(array.shape, array.dtype.name, "", start, array.nbytes)
    return places


def _uses(value: ir.Value) -> set[str]:
    return {site.use for site in linear_sites(value) or []}


def _is_product(value: ir.Value) -> bool:
    return len(value.shape or ()) == 2 and _uses(value) in ({"linear"}, {"matmul"})


def _is_kernel(value: ir.Value) -> bool:
    return len(value.shape or ()) > 2 and bool(conv_sites(value, grouped=True))


def _matrix(array: Array, bits: int, digest: str, *, turned: bool) -> Pack:
    """Quantise a matrix: (O, I) where the graph uses it turned, else (I, O)."""
    wide = np.ascontiguousarray(array.T if turned else array)  # (I, O)
    inputs, outputs = wide.shape
    blocks = -(-inputs // BLOCK)
    codes = np.zeros((outputs, blocks, BLOCK * bits // 8), np.uint8)
    scales, zeros = np.zeros((outputs, blocks), np.float32), np.zeros((outputs, blocks), np.uint8)
    # The kernels of onnxruntime.quantization, which sets up the logging of the whole process when it is imported.
    quantiser = ort_kernels.quantize_matmul_8bits if bits == 8 else ort_kernels.quantize_matmul_4bits
    padded = np.pad(wide, ((0, blocks * BLOCK - inputs), (0, 0)))
    quantiser(codes, padded, scales, zeros, BLOCK, outputs, inputs, True)
    numbers = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
    value = (numbers.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    value = value.reshape(len(value), -1)[:, : len(wide)]  # (O, I)
    return Pack(bits, codes, scales, np.ascontiguousarray(value if turned else value.T), digest, turned)


def _kernel(array: Array, digest: str) -> Pack:
    axes = tuple(range(1, array.ndim))
    scales = (np.abs(array).max(axes) / _LARGEST).astype(np.float32)
    scales[scales == 0] = 1  # a channel of zeros
    wide = scales.reshape(-1, *[1] * len(axes))
    codes = np.clip(np.rint(array / wide), -_LARGEST, _LARGEST).astype(np.int8)
    return Pack(_KERNEL_BITS, codes, scales, codes.astype(np.float32) * wide, digest)

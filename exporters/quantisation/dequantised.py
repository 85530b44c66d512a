"""A base with the values that quantised weights stand for: the oracle of everything but the quantisation itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy

import onnx_ir as ir
import torch
from torch import nn

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.quantisation.packs import Pack, Quantisation, pack_weights, quantisable
from tpeft_deploy.tucker import Array

__all__ = ["check_packed", "dequantised", "quantise_plan"]


def quantise_plan(
    base: Base, graph: ir.Graph, resolved: Mapping[str, str], choice: Quantisation, *, skip: Collection[str]
) -> tuple[Base, dict[str, Pack]]:
    """Quantise the weights of a prepared graph, which gets the values that they stand for.

    Args:
        base: base of the graph.
        graph: changed; it has no branches yet.
        resolved: weight -> initializer that holds it.
        choice: form of quantisation.
        skip: initializers that stay as they are.

    Returns:
        The base with those values, and initializer -> pack.

    Raises:
        UnsupportedBase: the base is quantised already, no torch module, or not in float32.
    """
    names = quantisable(graph, resolved, choice, base=base, skip=skip)
    digests = {name: weight_digest(base.weights[name]) for name in names}
    packs = pack_weights(graph, names, choice, digests)
    for name, pack in packs.items():
        graph.initializers[name].const_value = ir.tensor(pack.value, name=name)
    return dequantised(base, {name: pack.value for name, pack in packs.items()}), packs


def check_packed(packs: Iterable[Mapping[str, Pack]], choice: Quantisation, base: str) -> None:
    """Refuse an export of which nothing is quantised.

    Raises:
        UnsupportedBase: there is no pack.
    """
    if not any(packs):
        raise UnsupportedBase(
            f"quantise {base} to {choice.form}",
            expected="weights that are used in products" + (" or convolutions" if choice.form == "int8" else ""),
            got="none, apart from tied ones and those that adapters replace as a whole",
            fix="Leave quantise out" + (", or use int8 for convolutions." if choice.form == "int4" else "."),
        )


def dequantised(base: Base, values: Mapping[str, Array]) -> Base:
    """A copy of a base with other values of some weights; all other tensors are shared with it.

    Args:
        base: base of a torch module, left as it is; it is the copy's `floating`.
        values: weight -> float32 array in its shape.

    Raises:
        UnsupportedBase: the base has no module.
    """
    if base.module is None:
        raise UnsupportedBase(
            f"quantise base {base.name}",
            expected="a torch module or a model directory",
            got="an ONNX file",
            fix="Quantise the file with onnxruntime.quantization, and give it with weights= (--weights), its original "
            "weights.",
        )
    other = base.with_module(_copied(base.module, values))
    other.floating = base
    return other


def _copied(module: nn.Module, values: Mapping[str, Array]) -> nn.Module:
    held = [*module.parameters(), *module.buffers()]
    new: nn.Module = deepcopy(module, {id(tensor): tensor for tensor in held})
    named = dict(new.named_parameters(remove_duplicate=False))
    replaced = {id(named[name]): nn.Parameter(torch.from_numpy(array), False) for name, array in values.items()}
    for owner in new.modules():
        for name, tensor in owner._parameters.items():
            if tensor is not None and id(tensor) in replaced:
                owner._parameters[name] = replaced[id(tensor)]
    return new

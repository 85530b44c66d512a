"""Readers of PEFT's LoRA: on layers, on MultiheadAttention, and on other parameters; PiSSA and OLoRA as its inits."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np

from tpeft_deploy.algebra import DENSE, dense_is_smaller, is_dense, low_rank, widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import alpha_of, base_bias, is_type, matrix_delta, stored_transposed
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.patterns import Endings
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_attention", "read_experts", "read_lora", "scale_of", "subtract_initial"]

_A, _B = "lora_A.weight", "lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"


@reader(
    "peft-lora",
    About(
        "PEFT",
        "LoRA, rsLoRA, DoRA, PiSSA, OLoRA",
        "linear, Conv1D, conv 1d to 3d, embedding",
        "for DoRA, lora_bias, PiSSA and OLoRA",
        "low-rank, gain, override",
        types=("LORA",),
    ),
    {_A, _B, _EMBEDDING_A, _EMBEDDING_B, _BIAS, _MAGNITUDE},
    marks={_A, _B, _EMBEDDING_A, _EMBEDDING_B},
)
def read_lora(module: Module) -> Change:
    """LoRA as PEFT saves it, with rsLoRA, DoRA, biases and patterns (arXiv 2106.09685, 2312.03732, 2402.09353).

        dW = s B A        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

        layer            tensors                                                       weight
        Linear           lora_A.weight (r, I), lora_B.weight (O, r)                    (O, I)
        Conv1D           the same                                                      (I, O)
        Conv1d/2d/3d     lora_A.weight (r, I, K1, ...), lora_B.weight (O, r, 1, ...)   (O, I, K1, ...)
        Embedding        lora_embedding_A (r, N), lora_embedding_B (D, r)              (N, D)

    With lora_magnitude_vector m (DoRA) the adapted weight is m / |W + dW| times W + dW.  s times lora_B.bias is added
    to the bias.  The change of a convolution follows PEFT's merge; PEFT's unmerged branch ignores dilation and
    padding_mode.
    """
    target = f"{module.name}.weight"
    with module.reporting():
        delta, axis = _lora_delta(module)
        gains = {}
        if _MAGNITUDE in module.tensors:
            gains = {target: _dora_gain(module, delta, axis)}
        overrides = {}
        if _BIAS in module.tensors:
            overrides = {f"{module.name}.bias": _lora_bias(module, delta.scale)}
    return Change(deltas={target: delta}, overrides=overrides, gains=gains)


def scale_of(checkpoint: Checkpoint, name: str, rank: int) -> float:
    """Compute the factor s of a module by its name and rank, with alpha_pattern.

    Raises:
        FormatError: the configuration has no finite lora_alpha, or another rank.
    """
    alpha = alpha_of(checkpoint, name, rank, "lora_alpha")
    return alpha / (math.sqrt(rank) if checkpoint.config.get("use_rslora") else rank)


def _lora_delta(module: Module) -> tuple[TuckerDelta, int]:
    """The change, and the output axis of the weight, along which DoRA rescales."""
    module.no_scale()
    if _EMBEDDING_A in module.tensors or _EMBEDDING_B in module.tensors:
        rows, columns = module.take(_EMBEDDING_A), module.take(_EMBEDDING_B)
        return matrix_delta(rows.T, columns.T, scale_of(module.checkpoint, module.name, rows.shape[0])), 1
    down, up = module.take(_A), module.take(_B)
    scale = scale_of(module.checkpoint, module.name, down.shape[0])
    if down.ndim > 2:
        return _convolution(module, down, up, scale), 0
    transposed = stored_transposed(module, up.shape[0], down.shape[1])
    delta = matrix_delta(up, down, scale, transposed=transposed)
    delta = subtract_initial(module, delta, transposed=transposed)
    return delta, int(transposed)


def _convolution(module: Module, down: Array, up: Array, scale: float) -> TuckerDelta:
    if up.shape[1] != down.shape[0]:
        raise FormatError(
            module.doing,
            expected="a convolution of one group",
            got=f"lora_A of {down.shape[0]} channels that lora_B takes in groups of {up.shape[1]}: each group of "
            "outputs then sees all inputs, which a weight in groups cannot hold",
            fix="Train again without this layer in target_modules, or with a method that keeps the groups, such as "
            "LoHa, LoKr or tpeft_deploy.training.",
        )
    return TuckerDelta(down, (up.reshape(up.shape[:2]), *[None] * (down.ndim - 1)), scale)


def _dora_gain(module: Module, delta: TuckerDelta, axis: int) -> Array:
    """The magnitude over the norm of W + dW along all axes but `axis`, of a shape that broadcasts against W."""
    weight = module.base_array("weight", "DoRA's gain depends on the base's weight")
    magnitude = module.take(_MAGNITUDE)
    if delta.shape != weight.shape or magnitude.size != weight.shape[axis]:
        expected = f"a change of shape {weight.shape} with {weight.shape[axis]} magnitudes, as the base's weight"
        raise module.misfit(expected, f"{delta.shape} with {magnitude.size}")
    adapted = weight.astype(np.float64) + delta.dense()
    others = tuple(a for a in range(weight.ndim) if a != axis)
    norm = np.sqrt(np.square(adapted).sum(axis=others, keepdims=True))
    if not norm.all():
        raise FormatError(module.doing, problem="a channel of W + dW is zero, which DoRA divides by")
    gain: Array = magnitude.astype(np.float64).reshape(norm.shape) / norm
    return gain.astype(np.promote_types(magnitude.dtype, np.float32))


def _lora_bias(module: Module, scale: float) -> Array:
    added = module.take(_BIAS)
    bias = base_bias(module, "lora_bias adds to the base's bias")
    if bias is None or bias.shape != added.shape:
        raise FormatError(
            module.doing,
            expected=f"a bias of shape {added.shape} in the base, which lora_bias adds to",
            got="none" if bias is None else bias.shape,
            fix="Train again with lora_bias=False for layers without a bias.",
        )
    return (bias + scale * added).astype(np.promote_types(added.dtype, np.float32))


def subtract_initial(module: Module, delta: TuckerDelta, *, transposed: bool) -> TuckerDelta:
    """Compute the change s B A - P for PiSSA and OLoRA, of rank 2 r; s B A for every other init.

    At injection PEFT moves the first r components of the weight to A and B:

        W' = W - P        P = U_r S_r V_r^T (PiSSA, arXiv 2404.02948), or s Q_r R_r (OLoRA, arXiv 2406.01775)

    A file that was saved without conversion still has `init_lora_weights`.  The adapted weight is then W - P + s B A,
    and P is computed from the base in the same way as in PEFT.

    Args:
        module: module that is read.
        delta: s B A as factors of a weight.
        transposed: True if the weight is stored as (I, O).

    Raises:
        FormatError: no base was given to compute P from.
    """
    init = module.checkpoint.config.get("init_lora_weights")
    if not isinstance(init, str) or init.lower() not in {"pissa", "olora"}:
        return delta
    weight = module.base_array("weight", f"init_lora_weights={init!r} subtracts a part of the base's weight")
    if init.lower() == "olora" and transposed:
        raise FormatError(module.doing, expected="OLoRA on a Linear layer", got="a transformers Conv1D")
    if weight.shape != delta.shape:
        raise FormatError(module.doing, expected=f"a change of shape {weight.shape}", got=delta.shape)
    rank = delta.ranks[0]
    left, right, factor = _pissa(weight, rank, delta.scale) if init.lower() == "pissa" else _olora(weight, rank)
    core = np.zeros((rank + left.shape[1],) * 2, delta.core.dtype)
    core[:rank, :rank] = delta.core
    core[rank:, rank:] = -factor * np.eye(left.shape[1])
    up, down = delta.factors
    if up is None or down is None:
        raise FormatError(module.doing, expected="two factors", got="one")
    factors = (np.hstack([up, left.astype(up.dtype)]), np.hstack([down, right.astype(down.dtype)]))
    return TuckerDelta(core, factors, delta.scale)


def _pissa(weight: Array, rank: int, scale: float) -> tuple[Array, Array, float]:
    """P / s as U_r sqrt(S_r), V_r sqrt(S_r) and 1 / s."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, right[:rank].T * root, 1 / scale


def _olora(weight: Array, rank: int) -> tuple[Array, Array, float]:
    """P / s as Q_r, R_r^T and 1."""
    left, right = np.linalg.qr(weight.astype(np.float64))
    return left[:, :rank], right[:rank].T, 1.0


_OUT = ".base_layer.out_proj"
_TWICE = "PEFT adds the change of MultiheadAttention's out_proj twice, in training as well, so it is read as 2 s B A"


def _is_attention(module: Module) -> bool:
    """Whether the module is a MultiheadAttention of the base, or the out_proj inside one; precedes plain LoRA."""
    return is_type(module.checkpoint, "LORA") and _A in module.tensors and (_is_out(module) or _is_in(module))


@reader(
    "peft-lora-attention",
    About("PEFT", "LoRA", "MultiheadAttention", "yes", "low-rank"),
    {_A, _B, _BIAS},
    matches=_is_attention,
)
def read_attention(module: Module) -> Change:
    """LoRA on torch's MultiheadAttention as PEFT saves it: both projections, in_proj as one matrix.

        in_proj_weight   (3 E, E)   s B A       <module>.lora_A.weight (r, E), lora_B.weight (3 E, r)
        out_proj.weight  (E, E)     2 s B A     <module>.base_layer.out_proj.lora_A.weight, lora_B.weight

    The factor 2 is a property of PEFT (0.21.2): MultiheadAttention.merge, which forward calls too, adds the change of
    out_proj and then calls out_proj.merge, which adds it again.  The adapter was trained with it.
    """
    module.no_scale()
    if _BIAS in module.tensors:
        raise FormatError(
            module.doing,
            expected="LoRA without biases on MultiheadAttention",
            got="lora_bias, which PEFT leaves out of one projection and not of the other",
            fix="Train again with lora_bias=False.",
        )
    down, up = module.take(_A), module.take(_B)
    # PEFT uses the attention's rank and alpha for its out_proj.
    attention = module.name.removesuffix(".out_proj") if _is_out(module) else module.name
    with module.reporting():
        delta = matrix_delta(up, down, scale_of(module.checkpoint, attention, down.shape[0]))
    if not _is_out(module):
        return Change(deltas={f"{module.name}.in_proj_weight": delta})
    target = f"{module.name}.weight"
    return Change(deltas={target: replace(delta, scale=2 * delta.scale)}, notes={target: _TWICE})


def _is_out(module: Module) -> bool:
    return module.key.endswith(_OUT)


def _is_in(module: Module) -> bool:
    return module.checkpoint.base is not None and f"{module.name}.in_proj_weight" in module.checkpoint.base.weights


_WRAPPED = re.compile(r"(?:\.base_layer)*$")
_EXPERTS_NAME = "peft-lora-parameter"


def _is_experts(module: Module) -> bool:
    """Whether the configuration targets a parameter of this module; precedes plain LoRA."""
    if not is_type(module.checkpoint, "LORA") or _A not in module.tensors:
        return False
    targets = module.checkpoint.config.get("target_parameters")
    if not targets:
        return False
    if module.checkpoint.base is None:
        if _EXPERTS_NAME not in module.checkpoint.memo:
            module.checkpoint.memo[_EXPERTS_NAME] = Endings(target.rpartition(".")[0] for target in targets)
        owners: Endings = module.checkpoint.memo[_EXPERTS_NAME]
        return owners.end_module(module.checkpoint.trained_name(module.name))
    return bool(_targeted(module))


@reader(
    _EXPERTS_NAME,
    About("PEFT", "LoRA (target_parameters)", "stacked experts, other parameters", "yes", "low-rank, dense"),
    {_A, _B},
    matches=_is_experts,
)
def read_experts(module: Module) -> Change:
    """LoRA on parameters that are not a layer's weight (`target_parameters`), such as stacked experts.

        parameter (E, O, I)    dW[e] = s B_e A_e          lora_A.weight (r E, I), rows expert by expert
        parameter (E, I, O)    dW[e] = s (B_e A_e)^T      lora_B.weight (O, r E), columns rank by rank
        parameter (O, I)       dW = s B A, as one expert

    The file names only the module.  Several parameters of a module are wrapped one around the other, in the module's
    order: `<module>.lora_A` is the last, `<module>.base_layer.lora_A` the one before it.
    """
    module.no_scale()
    down, up = module.take(_A), module.take(_B)
    if module.checkpoint.base is None:
        raise module.needs_base("target_parameters are resolved by the base's parameters")
    name = _experts_parameter(module)
    shape = module.checkpoint.base.shape(name)
    with module.reporting():
        experts = shape[0] if len(shape) == 3 else 1
        rank, left = divmod(down.shape[0], experts)
        fits = len(shape) in {2, 3} and not left and rank and up.shape[1:] == down.shape[:1]
        if not fits or sorted(shape[-2:]) != sorted((up.shape[0], down.shape[1])):
            raise _experts_misfit(module, name, shape, down, up)
        scale = scale_of(module.checkpoint, name, rank)
        transposed = _experts_transposed(module, name, shape, outputs=up.shape[0])
        delta = _experts_delta(down, up, scale, shape, transposed=transposed)
    return Change(deltas={name: delta}, notes={name: DENSE} if is_dense(delta) else {})


def _experts_parameter(module: Module) -> str:
    """The parameter of these tensors, by the number of wrappers around it."""
    names = _targeted(module)
    if len(names) > 1 and module.checkpoint.base is not None and not module.checkpoint.base.kinds:
        raise FormatError(
            module.doing,
            expected="a torch module as base, which keeps the order of a module's parameters",
            got=f"a base without it, and {len(names)} parameters that target_parameters name",
            fix="Give base= as a torch module.",
        )
    wrapped = _WRAPPED.search(module.key)
    depth = wrapped[0].count(".base_layer") if wrapped else 0
    if depth >= len(names):
        expected = f"at least {depth + 1} parameters of this module that target_parameters name"
        raise module.misfit(expected, ", ".join(names))
    return names[-1 - depth]


def _targeted(module: Module) -> list[str]:
    targets = module.checkpoint.endings("target_parameters")
    names = module.checkpoint.parameters.get(module.name, [])
    return [name for name in names if targets.end_module(module.checkpoint.trained_name(name))]


def _experts_transposed(module: Module, name: str, shape: tuple[int, ...], *, outputs: int) -> bool:
    if len(shape) == 2:
        return False
    if shape[1] == shape[2]:
        raise FormatError(
            module.doing,
            expected=f"a parameter {name!r} with different numbers of inputs and outputs",
            got=f"shape {shape}, for which only the module's code defines whether outputs come first",
            fix="Merge it with PEFT's merge_and_unload and export the merged model as a separate base.",
        )
    return shape[2] == outputs


def _experts_delta(down: Array, up: Array, scale: float, shape: tuple[int, ...], *, transposed: bool) -> TuckerDelta:
    if len(shape) == 2:
        return low_rank(up, down, scale)
    experts, columns = shape[0], up.shape[1]
    rank, inputs = columns // experts, down.shape[1]
    ranks = (experts, inputs, columns) if transposed else (experts, columns, inputs)
    if dense_is_smaller(ranks, shape):
        order = "ore,eri->eio" if transposed else "ore,eri->eoi"
        down, up = widen(down).reshape(experts, rank, inputs), widen(up).reshape(-1, rank, experts)
        return TuckerDelta(np.einsum(order, up, down), (None, None, None), scale)
    # The core is zero except where the rows of A and the columns of B belong to the same expert.
    core = np.zeros((experts, rank, experts, inputs), down.dtype)
    core[range(experts), :, range(experts)] = down.reshape(experts, rank, inputs)
    core = core.reshape(experts, columns, inputs)
    return (
        TuckerDelta(core.swapaxes(1, 2), (None, None, up), scale)
        if transposed
        else TuckerDelta(core, (None, up, None), scale)
    )


def _experts_misfit(module: Module, name: str, shape: tuple[int, ...], down: Array, up: Array) -> FormatError:
    expected = f"tensors for the parameter {name!r} of shape {shape}"
    return module.misfit(expected, f"lora_A {down.shape} and lora_B {up.shape}")

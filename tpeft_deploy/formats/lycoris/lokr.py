"""LoKr as LyCORIS and sd-scripts write it: a Kronecker product, each half full or factored.

    dW = s kron(w1, w2)     w1 = lokr_w1 (a, c), or lokr_w1_a (a, r) lokr_w1_b (r, c)
                            w2 = lokr_w2 (b, d, K1, ...), or lokr_w2_a (b, r) lokr_w2_b (r, d K1 ...),
                            or, Tucker, lokr_t2 (r, r, K1, ...) x_0 lokr_w2_a^T (r, b) x_1 lokr_w2_b^T (r, d)

with s = alpha / r, applied once as in LyCORIS' forward; its merge_to applies it twice.  With both halves full there is
no rank, and s is 1 for any alpha.
"""

from __future__ import annotations

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.lycoris.dora import change_with_dora
from tpeft_deploy.formats.products.compact import DENSE, is_dense
from tpeft_deploy.formats.products.kronecker import Half, full, lokr, product, tucker
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing, no_scale, reporting, take, take_scale

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "lycoris-lokr"
ABOUT = About("LyCORIS, sd-scripts", "LoKr, with DoRA", "linear, conv", "yes", "low-rank, dense, gain")
_STARTS = ("lokr_w1", "lokr_w1_a")
_CORE = "lokr_t2"
SUFFIXES = frozenset(
    {*_STARTS, "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", _CORE, "alpha", "dora_scale"},
)

_FULL = "LoKr of two full halves, read with scale 1; LyCORIS' rs_lora trains these with another, which its file omits"


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has LoKr's first half, in a file without a configuration."""
    return any(name in module.tensors for name in _STARTS) and not checkpoint.config


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's LoKr as a Tucker delta, dense if that is smaller, with a gain if it has a dora_scale.

    Raises:
        FormatError: no base was given (needed for the weight's shape); a tensor is missing or does not fit; alpha is
            not finite.
    """
    shape = base_array(module, checkpoint, "weight", "LoKr does not state the weight's shape").shape
    first = _half(module, checkpoint, "lokr_w1", ())
    second = _half(module, checkpoint, "lokr_w2", shape[2:])
    scale, note = _scale(module, checkpoint, first, second)
    with reporting(module, checkpoint):
        delta = lokr(first, second, scale=scale, shape=shape)
    return change_with_dora(module, checkpoint, delta, DENSE if is_dense(delta) else None, note)


def _half(module: Module, checkpoint: Checkpoint, name: str, kernel: tuple[int, ...]) -> Half:
    if name in module.tensors:
        return full(module.tensors.pop(name))
    left, right = take(module, checkpoint, f"{name}_a"), take(module, checkpoint, f"{name}_b")
    core = module.tensors.pop(_CORE, None) if name == "lokr_w2" else None
    with reporting(module, checkpoint):
        return product(left, right, kernel) if core is None else tucker(core, left, right, kernel)


def _scale(module: Module, checkpoint: Checkpoint, first: Half, second: Half) -> tuple[float, str | None]:
    ranks = {half.rank for half in (first, second) if half.rank is not None}
    if not ranks:
        # Trainers write placeholders such as 1e10 as alpha, which LyCORIS, sd-scripts and ComfyUI ignore.
        no_scale(module, checkpoint)
        return 1.0, None if module.tensors.pop("alpha", None) is None else _FULL
    if len(ranks) > 1:
        raise FormatError(doing(module, checkpoint), expected="both halves of one rank", got=f"ranks {sorted(ranks)}")
    return take_scale(module, checkpoint, ranks.pop())

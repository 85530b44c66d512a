"""Weighted sums of adapters, exact.

    dW = sum_k s_k dW_k

The change of a LoRA is dW_k = c_k B_k A_k with c_k = alpha / r; concatenation gives the sum:

    [B_1 B_2] [s_1 c_1 A_1; s_2 c_2 A_2] = s_1 c_1 B_1 A_1 + s_2 c_2 B_2 A_2

as does PEFT's `add_weighted_adapter(combination_type="cat")`; "linear" adds B to B and A to A, which gives the cross
terms B_1 A_2 and B_2 A_1.  For a Tucker change G x_0 U_0 x_1 U_1 ... (FLoRA, arXiv 2405.14739, equation 6) factors are
concatenated mode by mode, [U_m^1 U_m^2], and the cores s_k c_k G_k are the blocks of a block-diagonal core, so that
there are no cross terms (`algebra.combine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TypeVar

import numpy as np

from tpeft_deploy import algebra
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import CompositionError
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["at_strength", "compose"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Part:
    task: str
    adapter: Adapter
    strength: float


def compose(parts: Mapping[str, tuple[Adapter, float]], *, aliases: Mapping[str, str] | None = None) -> Adapter:
    """Compute the weighted sum of adapters as one adapter.

    Each weight takes the form with the fewest elements: concatenated Tucker factors, concatenated pairs, or dense dW;
    all are sums in float64 of the same changes.  A weight that a single part changes keeps that part's delta.  Parts
    of strength 0 are ignored.  If one part remains, at strength 1, its adapter is returned unchanged.

    Gains and overrides cannot be scaled, so adapters that have them need strength 1.

    Args:
        parts: task -> (adapter, strength); a strength may be negative.
        aliases: further name of a module that is registered twice -> stored name, as in a bundle's `manifest.shared`;
            changes under both names are then treated as changes of one weight.

    Raises:
        CompositionError: no parts; a strength is not a finite number; a part with gains or overrides has a strength
            other than 1; a weight with a gain or an override is changed by another part too (equal overrides are
            allowed); the parts differ in the shapes or digests of their base weights; or the sum overflows.
    """
    if not parts:
        raise CompositionError(
            "compose {}", expected="at least one adapter with its strength", got="none", fix="Name 'base' for the base."
        )
    name = _describe({task: strength for task, (_, strength) in parts.items()})
    doing = f"compose {name}"
    named = [_Part(task, adapter, _number(doing, task, strength)) for task, (adapter, strength) in parts.items()]
    for part in named:
        _check_wholes(doing, part)
    taking = [part for part in named if part.strength] or named
    if len(taking) == 1 and taking[0].strength == 1:
        return taking[0].adapter
    taking = [_renamed(doing, part, aliases or {}) for part in taking]
    _check_apart(doing, taking)
    digests = _agreed(doing, "base weight", taking, lambda adapter: adapter.base_digests)
    overrides = _agreed(doing, "override", taking, lambda adapter: adapter.served_overrides)
    # Batch counters, which inference does not read: any part's will do.
    unread = {name: array for part in reversed(taking) for name, array in part.adapter.overrides.items()}
    gains = {name: gain for part in taking for name, gain in part.adapter.gains.items()}
    names = dict.fromkeys(name for part in taking for name in part.adapter.deltas)
    labels = {part.adapter.labels for part in taking}
    return Adapter(
        {weight: _delta(doing, weight, taking) for weight in names},
        unread | overrides,
        digests,
        source=name,
        gains=gains,
        labels=labels.pop() if len(labels) == 1 else None,
    )


def at_strength(adapter: Adapter, strength: float, *, task: str) -> Adapter:
    """Multiply an adapter's change by a strength, as diffusers' `set_adapters` does.

    Args:
        adapter: adapter with neither gains nor overrides, which cannot be scaled.
        strength: any finite number.
        task: name for messages.

    Raises:
        CompositionError: the adapter has gains or overrides, or the strength is not finite.
    """
    if strength == 1:
        return adapter
    return replace(
        compose({task: (adapter, strength)}),
        source=f"{adapter.source} at strength {strength:g}",
        notes=adapter.notes,
        left_out=adapter.left_out,
    )


def _describe(strengths: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{task}: {_spelt(strength)}" for task, strength in strengths.items()) + "}"


def _spelt(strength: object) -> str:
    # bool is a subclass of int, but a strength of True is a mistake.
    if isinstance(strength, Real) and not isinstance(strength, bool):
        return f"{_as_float(strength):g}"
    return repr(strength)[:40]


def _as_float(number: Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _number(doing: str, task: str, strength: object) -> float:
    number = _as_float(strength) if isinstance(strength, Real) and not isinstance(strength, bool) else math.nan
    if not math.isfinite(number):
        raise CompositionError(
            f"{doing}, strength of {task!r}",
            expected="a finite number",
            got=f"{type(strength).__name__} {_spelt(strength)}",
        )
    return number


def _check_wholes(doing: str, part: _Part) -> None:
    """Refuse a strength other than 1 for what cannot be scaled."""
    wholes = {"gain": part.adapter.gains, "override": part.adapter.served_overrides}
    for what, tensors in wholes.items():
        if tensors and part.strength != 1:
            raise CompositionError(
                f"{doing}, weight {next(iter(tensors))!r}",
                expected=f"strength 1 for {part.task!r}, as it has {what}s, which have no strength",
                got=f"{part.strength:g}",
                fix=f"Give {part.task!r} strength 1, or train it without {what}s.",
            )


def _renamed(doing: str, part: _Part, aliases: Mapping[str, str]) -> _Part:
    """The part with every weight under the name it is stored under."""
    adapter = part.adapter

    def stored(tensors: Mapping[str, _T]) -> dict[str, _T]:
        found: dict[str, _T] = {}
        for name, tensor in tensors.items():
            canonical = aliases.get(name, name)
            if canonical in found:
                raise CompositionError(
                    f"{doing}, weight {canonical!r}",
                    expected=f"one change of it in {part.task!r}",
                    got=f"another under {name!r}, to which it is tied",
                    fix="Keep one of the two.",
                )
            found[canonical] = tensor
        return found

    digests = {aliases.get(name, name): digest for name, digest in adapter.base_digests.items()}
    deltas, overrides, gains = stored(adapter.deltas), stored(adapter.overrides), stored(adapter.gains)
    for name in sorted((deltas.keys() | gains.keys()) & overrides.keys()):
        raise _meeting(doing, name, f"an override in {part.task!r} alone", "another change under a name tied to it")
    return replace(
        part, adapter=replace(adapter, deltas=deltas, overrides=overrides, gains=gains, base_digests=digests)
    )


def _check_apart(doing: str, parts: Sequence[_Part]) -> None:
    """Raise if one part scales or replaces a weight that another part changes too."""
    for part in parts:
        others = [other for other in parts if other is not part]
        for name in part.adapter.gains:
            for other in others:
                if name in other.adapter.deltas or name in other.adapter.gains or name in other.adapter.overrides:
                    raise _meeting(doing, name, f"the gain of {part.task!r} alone", f"a change by {other.task!r} too")
        for name in part.adapter.served_overrides:
            for other in others:
                if name in other.adapter.deltas:
                    raise _meeting(
                        doing, name, f"the override of {part.task!r} alone", f"a change by {other.task!r} too"
                    )


def _meeting(doing: str, name: str, expected: str, got: str) -> CompositionError:
    return CompositionError(
        f"{doing}, weight {name!r}", expected=expected, got=got, fix="Leave one of them out: they have no exact sum."
    )


def _agreed(
    doing: str, what: str, parts: Sequence[_Part], tensors: Callable[[Adapter], Mapping[str, _T]]
) -> dict[str, _T]:
    """Merge the parts' tensors by weight; parts that have one for the same weight must agree."""
    agreed: dict[str, tuple[str, _T]] = {}
    for part in parts:
        for name, value in tensors(part.adapter).items():
            task, first = agreed.setdefault(name, (part.task, value))
            if not np.array_equal(np.asarray(first), np.asarray(value)):
                raise CompositionError(
                    f"{doing}, weight {name!r}",
                    expected=f"the {what} of {task!r}{_shown(first)}",
                    got=f"another in {part.task!r}{_shown(value)}",
                    fix="Leave one of them out: they were not made for one model.",
                )
    return {name: value for name, (_, value) in agreed.items()}


def _shown(value: object) -> str:
    return f" of shape {value.shape}" if isinstance(value, np.ndarray) else f" ({str(value)[:12]}...)"


def _delta(doing: str, name: str, parts: Iterable[_Part]) -> TuckerDelta:
    """Weighted sum of the parts' changes of one weight."""
    terms = [(part, delta) for part in parts if (delta := part.adapter.deltas.get(name)) is not None]
    first, change = terms[0]
    # The same object several times (an adapter under two names) counts once, with the sum of its strengths.
    strengths: dict[int, float] = {}
    for part, delta in terms:
        if delta.shape != change.shape:
            raise CompositionError(
                f"{doing}, weight {name!r}",
                expected=f"a change of shape {change.shape}, as in {first.task!r}",
                got=f"{delta.shape} in {part.task!r}",
                fix="They were made for other bases.",
            )
        strengths[id(delta)] = strengths.get(id(delta), 0.0) + part.strength
    weighted = [(delta, strengths.pop(id(delta))) for _, delta in terms if id(delta) in strengths]
    # Changes of strength 0 add nothing; if all have strength 0, one is kept.
    weighted = [(delta, strength) for delta, strength in weighted if strength] or weighted[:1]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _sum([delta for delta, _ in weighted], [strength for _, strength in weighted])
    except ValueError as error:
        raise CompositionError(
            f"{doing}, weight {name!r}", expected="a finite sum", got=str(error), fix="Use smaller strengths."
        ) from error


def _sum(deltas: Sequence[TuckerDelta], strengths: Sequence[float]) -> TuckerDelta:
    """Weighted sum in the form with the fewest elements."""
    if len(deltas) == 1:
        return replace(deltas[0], scale=deltas[0].scale * strengths[0])
    if any(algebra.is_dense(delta) for delta in deltas):
        return algebra.combine(deltas, strengths)
    pairs = [_pair(delta) for delta in deltas]
    best = min(deltas, pairs, key=_numbers)
    if _numbers(best) < math.prod(deltas[0].shape):
        return algebra.combine(best, strengths)
    total: Array = np.zeros(deltas[0].shape)
    for delta, strength in zip(deltas, strengths, strict=True):
        total += strength * delta.dense()
    return TuckerDelta(total, (None,) * total.ndim)


def _pair(delta: TuckerDelta) -> TuckerDelta:
    """The delta as a low-rank pair, which needs no block-diagonal core in a sum; never larger for matrices."""
    a, b = algebra.low_rank_pair(delta)
    return TuckerDelta(a, (b, *(None,) * (a.ndim - 1)))


def _numbers(deltas: Sequence[TuckerDelta]) -> int:
    """Number of elements of `algebra.combine(deltas)`."""
    shape = deltas[0].shape
    shared = [any(delta.factors[mode] is None for delta in deltas) for mode in range(len(shape))]
    ranks = [sum(delta.ranks[mode] for delta in deltas) for mode in range(len(shape))]
    core = math.prod(size if same else rank for size, rank, same in zip(shape, ranks, shared, strict=True))
    return core + sum(size * rank for size, rank, same in zip(shape, ranks, shared, strict=True) if not same)

"""Changes of tied weights: one tensor that several modules use, each under a separate name.

Training libraries wrap one module and leave the others that share its tensor unchanged, so a change applies only to
the module that it names.  If each module has a separate initializer in the graph, nothing needs to be done.  If one
initializer serves several modules, the change must be the same under all their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tpeft_deploy import algebra
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import UnknownTarget
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["Ties", "changed_names", "settle"]

Ties = Sequence[Sequence[str]]
_ROUNDING = 1e-6


def changed_names(adapter: Adapter) -> list[str]:
    """Names of the weights that an adapter changes, without duplicates."""
    return list(dict.fromkeys([*adapter.deltas, *adapter.gains, *adapter.served_overrides]))


def settle(adapter: Adapter, stored: Mapping[str, str], ties: Ties, *, doing: str) -> Adapter:
    """Rename an adapter's changes to the names that their weights are stored under.

    A change under a name that no forward pass reads is dropped if all used names of the tensor have the same change.
    All other names that are not stored stay as they are.

    Args:
        adapter: adapter with the model's names of weights.
        stored: name of a weight -> stored name; names that no forward pass reads are absent.
        ties: for each tied tensor, one name of every module that holds it, used or not.
        doing: operation, for messages.

    Raises:
        UnknownTarget: a stored weight serves several modules and the adapter does not change all of them alike, or two
            names of one module are changed.
    """
    groups = {name: group for group in ties for name in group}
    chosen: dict[str, str] = {}
    for name in changed_names(adapter):
        group, held = groups.get(name, ()), stored.get(name)
        if held is None:
            uses = [other for other in group if other in stored]
            if not uses or not all(_alike(adapter, name, other) for other in uses):
                chosen[name] = name
            continue
        uses = [other for other in group if stored.get(other) == held]
        _check_whole(adapter, name, uses, doing)
        if chosen.setdefault(held, name) not in {name, *uses}:
            raise UnknownTarget(
                f"{doing}, weight {name!r}", problem=f"it is tied to {chosen[held]!r}, which the adapter changes too"
            )
    served = adapter.served_overrides
    unread = {name: array for name, array in adapter.overrides.items() if name not in served}
    return replace(
        adapter,
        deltas={held: adapter.deltas[name] for held, name in chosen.items() if name in adapter.deltas},
        gains={held: adapter.gains[name] for held, name in chosen.items() if name in adapter.gains},
        overrides=unread | {held: served[name] for held, name in chosen.items() if name in served},
    )


def _check_whole(adapter: Adapter, name: str, uses: Sequence[str], doing: str) -> None:
    for other in uses:
        if not _alike(adapter, name, other):
            raise UnknownTarget(
                f"{doing}, weight {name!r}",
                expected=f"the same change of {other!r}, as one initializer holds both",
                got="another" if other in changed_names(adapter) else "none: training changed one use of a tied weight",
                fix="Export the base again from the torch module, which gives every use a separate initializer.",
            )


def _alike(adapter: Adapter, one: str, other: str) -> bool:
    """Whether an adapter changes two weights of equal values in the same way."""
    for arrays in (adapter.gains, adapter.overrides):
        mine, its = arrays.get(one), arrays.get(other)
        if (mine is None) != (its is None) or (mine is not None and not np.array_equal(mine, np.asarray(its))):
            return False
    a, b = adapter.deltas.get(one), adapter.deltas.get(other)
    return _equal(a, b) if a is not None and b is not None else a is b


def _equal(a: TuckerDelta, b: TuckerDelta) -> bool:
    if a is b or a.shape != b.shape:
        return a is b
    return algebra.combine([a, b], [1.0, -1.0]).norm() <= _ROUNDING * a.norm()

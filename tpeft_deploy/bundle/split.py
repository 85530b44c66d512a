"""Split an adapter over the components of a model: each takes the changes of the weights that its graphs hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import TypeVar

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import UnknownTarget
from tpeft_deploy.ties import Ties, changed_names

__all__ = ["check_taken", "part_of", "taken_names"]

_T = TypeVar("_T")


def taken_names(read: Mapping[str, Iterable[str]], ties: Mapping[str, Ties]) -> dict[str, frozenset[str]]:
    """Names of weights with changes that each component takes.

    A component takes the names of its graphs' weights, and names tied to them that no component reads: their changes
    must be those of the names that are read.

    Args:
        read: component -> every name of the weights that its graphs read.
        ties: component -> tied names of its weights, as a manifest has them.
    """
    used = {component: frozenset(names) for component, names in read.items()}
    every = frozenset[str]().union(*used.values())
    taken = dict(used)
    for component, groups in ties.items():
        for group in groups:
            if used[component] & set(group):
                taken[component] |= set(group) - every
    return taken


def part_of(adapter: Adapter, names: frozenset[str]) -> Adapter | None:
    """Reduce an adapter to the changes of some weights; None if it changes none of them."""

    def among(tensors: Mapping[str, _T]) -> dict[str, _T]:
        return {name: tensor for name, tensor in tensors.items() if name in names}

    deltas, gains, overrides = among(adapter.deltas), among(adapter.gains), among(adapter.overrides)
    if not (deltas or gains or overrides):
        return None
    digests = among(adapter.base_digests)
    return replace(adapter, deltas=deltas, gains=gains, overrides=overrides, base_digests=digests)


def check_taken(adapter: Adapter, names: Mapping[str, frozenset[str]], *, doing: str) -> None:
    """Check that every change of an adapter is taken by a component.

    Args:
        adapter: adapter for the whole model.
        names: component -> names that it takes.
        doing: operation, for messages.

    Raises:
        UnknownTarget: no component takes a change.
    """
    known = frozenset[str]().union(*names.values())
    missing = [name for name in changed_names(adapter) if name not in known]
    if not missing:
        return
    near = get_close_matches(missing[0], known, n=1)
    others = f", nor for {', '.join(missing[1:4])}{' and others' if len(missing) > 4 else ''}" if missing[1:] else ""
    raise UnknownTarget(
        f"{doing}, weight {missing[0]!r}",
        expected=f"a weight of one of the components {', '.join(names)}",
        got=f"no weight of that name{others}",
        fix=f"Did you mean {near[0]!r}?" if near else "Check that the base is what the adapter was trained on.",
    )

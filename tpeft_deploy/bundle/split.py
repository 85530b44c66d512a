"""Split an adapter over the components of a model: each takes the changes of the weights that its graphs hold.

Changes of weights that no output depends on, such as the last layer of a vision tower, are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeVar

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import UnknownTarget
from tpeft_deploy.ties import Ties, changed_names

__all__ = [
    "UNREAD",
    "check_taken",
    "joint_oracle",
    "part_of",
    "taken_names",
    "unread_weights",
    "warn_unread",
]

UNREAD = "no output of the base depends on it"  # reason in `left_out` of an adapter and of a manifest

_log = logging.getLogger("tpeft_deploy.bundle")

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


def unread_weights(manifest: Manifest) -> frozenset[str]:
    """Weights that no output reads, according to the changes that an export with `unused="skip"` left out."""
    unread = {name for record in manifest.left_out.values() for name, reason in record.items() if reason == UNREAD}
    return frozenset(unread - manifest.stored.keys())  # an adapter may have the record from an export of another base


def warn_unread(task: str, names: Sequence[str], *, base: str) -> None:
    """Log a warning that names the changes of a task that are left out, if there are any."""
    if names:
        _log.warning("leave out of task %s what no output of %s depends on: %s", task, base, ", ".join(names))


def joint_oracle(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the comparisons of a task in several components: by the training library if all of them were."""
    errors = [record["error"] for record in found if record["error"] is not None]
    merged = next((record for record in found if record["reason"]), found[0])
    return {**merged, "error": max(errors, default=None)}


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
        fix=(f"Did you mean {near[0]!r}? " if near else "Check that the base is what the adapter was trained on. ")
        + "If no output of the model depends on the weight, export the bundle with this adapter and --unused skip.",
    )

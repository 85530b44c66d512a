"""The error of each target alone, for a report to show which branch a deviation comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit, slots
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.proof.bundle_graphs import FACTORED
from tpeft_deploy.exporters.proof.forms_and_rows import branch_limit
from tpeft_deploy.progress import Progress, Stage
from tpeft_deploy.ties import changed_names

__all__ = ["MOST", "TargetCheck", "check_targets", "parts_of", "ranks_of"]

MOST = 24  # targets of one task that are run alone


@dataclass(frozen=True)
class TargetCheck:
    """The factored form fed one weight's change alone, against the reference with that change alone.

    Args:
        task: task that the change belongs to.
        weights: names, usually one; heads of another size change with their biases.
        kinds: kinds of the branches that took it.
        check: measurement at the example's sizes.
    """

    task: str
    weights: tuple[str, ...]
    kinds: tuple[str, ...]
    check: Check

    def to_json(self) -> dict[str, Any]:
        """Entry that --json prints."""
        return {
            "task": self.task,
            "weights": list(self.weights),
            "kinds": list(self.kinds),
            "error": self.check.error,
            "limit": self.check.limit,
        }


def check_targets(
    subject: Subject, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress
) -> Iterator[TargetCheck]:
    """Run every target of every task alone; of a task with many, `MOST` that are spread evenly over it."""
    sizes = subject.shapes[0]
    inputs = subject.inputs(sizes)
    session, limit = compare.open_session(bundle.path / FACTORED), branch_limit(subject, bundle, sizes)
    for position, (task, adapter) in enumerate(adapters.items()):
        progress(Stage(f"check each target of {task}", position, len(adapters)))
        parts = parts_of(bundle, adapter)
        chosen = np.unique(np.linspace(0, len(parts) - 1, min(MOST, len(parts))).round().astype(int))
        for part in (parts[place] for place in chosen):
            filled = bundle.fill(part)
            answer = partial(compare.run, session, inputs, fit.named(bundle.manifest, filled))
            check = compare.measure("factored", task, sizes, answer, subject.answer(part, inputs), limit)
            kinds = tuple(target.kind for target in bundle.manifest.targets if target.key in filled)
            yield TargetCheck(task, tuple(_changed(part)), kinds, check)


def parts_of(bundle: Bundle, adapter: Adapter) -> list[Adapter]:
    """An adapter cut into adapters for one weight each; overrides of another size than the base's stay together."""
    groups: dict[str, list[str]] = {}
    for name in changed_names(adapter):
        weight = bundle.manifest.canonical(name)
        if weight not in bundle.manifest.weights:
            continue  # no forward pass reads it, and the adapter changes all that are tied to it alike
        resized = name in adapter.overrides and adapter.overrides[name].shape != bundle.manifest.weights[weight].shape
        groups.setdefault("" if resized else weight, []).append(name)
    if "" in groups:
        groups[""] = sorted(groups.pop(""))
    return [
        Adapter(
            {name: adapter.deltas[name] for name in names if name in adapter.deltas},
            {name: adapter.overrides[name] for name in names if name in adapter.overrides},
            source=adapter.source,
            gains={name: adapter.gains[name] for name in names if name in adapter.gains},
        )
        for names in groups.values()
    ]


def ranks_of(bundle: Bundle, adapter: Adapter) -> dict[str, dict[str, int]]:
    """Target key -> the sizes of its slots' letters for an adapter."""
    filled = bundle.fill(adapter)
    targets = {target.key: target for target in bundle.manifest.targets}
    return {key: slots.ranks_of(targets[key], dict(own)) for key, own in filled.items()}


def _changed(part: Adapter) -> list[str]:
    return list(dict.fromkeys([*part.deltas, *part.gains, *part.overrides]))

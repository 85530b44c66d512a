"""A bundle of several components: each traced once, adapters split over them, and every graph proved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import COMPONENTS, MANIFEST, Bundle
from tpeft_deploy.bundle.manifest import Manifest, check_name
from tpeft_deploy.bundle.split import check_taken, part_of, taken_names
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.component import Component
from tpeft_deploy.exporters.bases.known_components import known_components
from tpeft_deploy.exporters.graph.unused import Unused
from tpeft_deploy.exporters.graph.unused import without as left_out
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.planning import Plan, Traced, check_tasks, plan_traced, trace
from tpeft_deploy.exporters.targets import covers, without
from tpeft_deploy.exporters.writing import finish, write_graphs
from tpeft_deploy.files import digest_file, new_directory
from tpeft_deploy.progress import Progress, Stage
from tpeft_deploy.ties import changed_names
from tpeft_deploy.version import __version__

__all__ = ["component_progress", "export_components", "find_components", "refuse_options"]


def find_components(base: object) -> dict[str, Component] | None:
    """Components of a base that has several; None for any other base.

    Raises:
        BundleError: a name is not allowed.
        UnsupportedBase: a value of a dict is no component, or a directory cannot be loaded.
    """
    found = known_components(base) if isinstance(base, str | os.PathLike) else base
    if not isinstance(found, Mapping):
        return None
    for name, component in found.items():
        check_name(name, "component")
        if not isinstance(component, Component):
            raise UnsupportedBase(
                f"load component {name!r}",
                expected="a Component(module, example_inputs)",
                got=type(component).__name__,
            )
    if not found:
        raise UnsupportedBase("load the components of a model", expected="one component or more", got="an empty dict")
    return dict(found)


def refuse_options(path: Path, options: Sequence[object]) -> None:
    """Refuse options of `export_bundle` that belong to one component.

    Raises:
        UnsupportedBase: one is given.
    """
    if any(option is not None and option is not False and option != {} for option in options):
        raise UnsupportedBase(
            f"export bundle {path} of several components",
            expected="no example_inputs, dynamic_shapes, weights, rename, padding, resize_embeddings or generation",
            got="some",
            fix="Give inputs, shapes, names and padding with each Component; leave the others out.",
        )


def export_components(
    components: Mapping[str, Component],
    adapters: Mapping[str, Adapter],
    path: Path,
    *,
    name: str,
    max_rank: int | None,
    folded: bool,
    tolerance: float | None,
    unused: Unused,
    exclude: Sequence[str],
    progress: Progress,
) -> Bundle:
    """Export components of one model and adapters for it, as `export_bundle` describes.

    Raises:
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    plans, adapters = _plan(
        components, adapters, name=name, max_rank=max_rank, unused=unused, exclude=exclude, progress=progress
    )
    with new_directory(path) as new:
        subjects = {own: Subject(plan.base, plan.raw.graph) for own, plan in plans.items()}
        manifests = {}
        for position, (own, plan) in enumerate(plans.items()):
            progress(Stage(f"write the graphs of {own}", position, len(plans)))
            place = new / COMPONENTS / own
            place.mkdir(parents=True)
            manifests[own] = write_graphs(plan, subjects[own], place, tolerance)
        bundle = _whole(new, name, manifests)
        for position, (task, adapter) in enumerate(adapters.items()):
            progress(Stage(f"store {task}", position, len(adapters)))
            bundle.add(task, adapter)
        for own, part in bundle.components.items():
            sources = Sources(subjects[own], keep=folded, whole=adapters)
            finish(plans[own], sources, part, folded=folded, progress=component_progress(own, progress))
        digests = {own: digest_file(new / COMPONENTS / own / MANIFEST) for own in plans}
        (new / MANIFEST).write_text(replace(bundle.manifest, components=digests).to_json(), encoding="utf-8")
        Bundle.open(new)
    return Bundle.open(path)


def _plan(
    components: Mapping[str, Component],
    adapters: Mapping[str, Adapter],
    *,
    name: str,
    max_rank: int | None,
    unused: Unused,
    exclude: Sequence[str],
    progress: Progress,
) -> tuple[dict[str, Plan], dict[str, Adapter]]:
    """Plan every component with its parts of the adapters.

    Returns:
        Plans by component, and the whole adapters without what `unused` leaves out.
    """
    check_tasks(name, adapters)
    bases = {own: component.base(own) for own, component in components.items()}
    known = {own: frozenset(base.weights) for own, base in bases.items()}
    for adapter in adapters.values():
        check_taken(adapter, known, doing=f"fit {adapter.source} to the components of bundle {name!r}")
        for own, base in bases.items():
            part = part_of(adapter, known[own])
            if part is not None:
                base.check(part)
    without([], exclude, frozenset[str]().union(*known.values()), base=f"bundle {name!r}", given=False)
    traced = {own: trace(base, component_progress(own, progress)) for own, base in bases.items()}
    names = taken_names(
        {own: found.resolved for own, found in traced.items()}, {own: base.ties for own, base in bases.items()}
    )
    adapters, names = _settle_unread(adapters, names, known, unused)
    plans = {}
    for own, found in traced.items():
        parts = {task: part_of(adapter, names[own]) for task, adapter in adapters.items()}
        plans[own] = plan_traced(
            found,
            {task: part for task, part in parts.items() if part is not None},
            name=own,
            max_rank=max_rank,
            padding=components[own].padding,
            unused="error",
            exclude=_excluded(exclude, found),
            every=not adapters,
        )
    return plans, adapters


def _settle_unread(
    adapters: Mapping[str, Adapter],
    names: Mapping[str, frozenset[str]],
    known: Mapping[str, frozenset[str]],
    unused: Unused,
) -> tuple[dict[str, Adapter], dict[str, frozenset[str]]]:
    """Leave out changes of weights that no component reads, or leave them to a component, which refuses them."""
    read = frozenset[str]().union(*names.values())
    idle = {task: [n for n in changed_names(adapter) if n not in read] for task, adapter in adapters.items()}
    if unused == "skip":
        return {task: left_out(adapter, idle[task]) if idle[task] else adapter for task, adapter in adapters.items()}, {
            **names
        }
    refused = {name for task in adapters for name in idle[task]}
    return dict(adapters), {own: names[own] | (refused & known[own]) for own in names}


def _excluded(patterns: Sequence[str], traced: Traced) -> list[str]:
    return [pattern for pattern in patterns if any(covers(pattern, name) for name in traced.resolved)]


def _whole(path: Path, name: str, manifests: Mapping[str, Manifest]) -> Bundle:
    """Make the bundle of components that have no proofs yet: their digests are those of no manifest."""
    cover = Manifest.of_components(name, f"tpeft-deploy {__version__}", dict.fromkeys(manifests, ""))
    parts = {own: Bundle(path / COMPONENTS / own, manifest) for own, manifest in manifests.items()}
    return Bundle(path, cover).joined(parts)


def component_progress(component: str, progress: Progress) -> Progress:
    """Make a callback for the stages of one component."""

    def begin(stage: str) -> None:
        progress(f"{component}: {stage}")

    return begin

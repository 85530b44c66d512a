"""A bundle of several components: each traced once, adapters split over them, and every graph proved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import COMPONENTS, MANIFEST, Bundle
from tpeft_deploy.bundle.manifest import Manifest, check_name
from tpeft_deploy.bundle.split import check_taken, part_of, taken_names
from tpeft_deploy.bundle.text_files import Mode, Pooling
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.component import Component
from tpeft_deploy.exporters.bases.known_components import known_components
from tpeft_deploy.exporters.graph.unused import Unused, leave_out
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.planning import Plan, Traced, check_tasks, plan_bundle, plan_traced, trace
from tpeft_deploy.exporters.quantisation.dequantised import check_packed
from tpeft_deploy.exporters.quantisation.packs import Quantisation
from tpeft_deploy.exporters.targets import covers, without
from tpeft_deploy.exporters.writing import finish, write_graphs
from tpeft_deploy.files import digest_file, new_directory
from tpeft_deploy.formats.base.model import CalledFactory, called
from tpeft_deploy.progress import Progress, Stage, silent
from tpeft_deploy.ties import changed_names
from tpeft_deploy.version import __version__

__all__ = ["component_progress", "dry_run", "export_components", "find_components", "refuse_options"]

_TOKENS = "input_ids"


def find_components(
    base: object, generation: bool = False, pooling: Pooling | Mode | None = None
) -> dict[str, Component] | None:
    """Components of a base that has several; None for any other base.

    Args:
        base: base as `export_bundle` takes it; the name of a factory with its result (see `called`).
        generation: whether the decoder of a directory is in slot form.
        pooling: pooling of the component that embeds text.

    Raises:
        BundleError: a name is not allowed.
        UnsupportedBase: a value of a dict is no component, a directory cannot be loaded, a dict is for generation, or
            there is a pooling and not one component that it may be for.
    """
    found = base.result if isinstance(base, CalledFactory) else base
    if generation and isinstance(found, Mapping):
        raise UnsupportedBase(
            "load the components of a model for generation",
            expected="a directory",
            got="a dict",
            fix="Give the directory.",
        )
    directory = Path(found) if isinstance(found, str | os.PathLike) else None
    found = known_components(directory, generation) if directory is not None else found
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
    return dict(found) if pooling is None else _with_pooling(found, pooling, directory)


def _with_pooling(
    components: Mapping[str, Component], pooling: Pooling | Mode, directory: Path | None
) -> dict[str, Component]:
    """Declare the pooling of the component that reads tokens and is no decoder."""
    readers = [name for name, own in components.items() if own.decoder is None and _TOKENS in own.example_inputs]
    if len(readers) != 1:
        raise UnsupportedBase(
            "export components with pooling=",
            expected=f"one that reads {_TOKENS}",
            got=", ".join(readers) or "none",
            fix="Give pooling= with the Component that embeds text.",
        )
    own = components[readers[0]]
    return {**components, readers[0]: replace(own, pooling=pooling, directory=own.directory or directory)}


def refuse_options(path: Path, options: Sequence[object]) -> None:
    """Refuse options of `export_bundle` that belong to one component.

    Raises:
        UnsupportedBase: one is given.
    """
    if any(option is not None and option is not False and option != {} for option in options):
        raise UnsupportedBase(
            f"export bundle {path} of several components",
            expected="no example_inputs, dynamic_shapes, weights, rename, padding or resize_embeddings",
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
    choice: Quantisation | None,
    progress: Progress,
) -> Bundle:
    """Export components of one model and adapters for it, as `export_bundle` describes.

    Raises:
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    plans, adapters = _plan_all(
        components,
        adapters,
        name=name,
        max_rank=max_rank,
        unused=unused,
        exclude=exclude,
        choice=choice,
        progress=progress,
    )
    with new_directory(path) as new:
        subjects = {own: Subject(plan.base, plan.raw.graph) for own, plan in plans.items()}
        manifests = {}
        for position, (own, plan) in enumerate(plans.items()):
            progress(Stage(f"write the graphs of {own}", position, len(plans)))
            place = new / COMPONENTS / own
            place.mkdir(parents=True)
            manifests[own] = write_graphs(plan, subjects[own], place, tolerance, components[own].pooling)
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


def dry_run(
    base: object, adapters: Mapping[str, Adapter], *, name: str, progress: Progress = silent, **options: Any
) -> dict[str, Any]:
    """Plan an `export_bundle` with the same arguments; return the document that a dry run prints.

    Raises:
        BundleError, UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, UnsupportedTarget: as `export_bundle`.
    """
    base = called(base)
    components = find_components(base, options.get("generation", False))
    if components is None:
        return plan_bundle(base, adapters, name=name, progress=progress, **options).to_json()
    defaults = {"max_rank": None, "unused": "error", "exclude": (), "choice": None}
    refuse_options(Path(name), [value for option, value in options.items() if option not in {*defaults, "generation"}])
    chosen: Any = {option: options.get(option, default) for option, default in defaults.items()}
    plans, adapters = _plan_all(components, adapters, name=name, progress=progress, **chosen)
    return _document(name, plans, adapters)


def _document(name: str, plans: Mapping[str, Plan], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Join the documents of components; each target names the component that it belongs to."""
    found = {own: plan.to_json() for own, plan in plans.items()}
    base_bytes = sum(document["base_bytes"] for document in found.values())
    slots = dict.fromkeys(adapters, 0)
    for document in found.values():
        for entry in document["tasks"]:
            slots[entry["task"]] += entry["slot_bytes"]
    return {
        "name": name,
        "base": f"components {', '.join(plans)}",
        "rows": "group" if any(document["rows"] for document in found.values()) else None,
        "rows_reason": next((document["rows_reason"] for document in found.values() if document["rows_reason"]), ""),
        "base_bytes": base_bytes,
        "tasks": [
            {
                "task": task,
                "parameters": adapter.parameters,
                "bytes": adapter.nbytes,
                "slot_bytes": slots[task],
                "share": adapter.nbytes / base_bytes,
            }
            for task, adapter in adapters.items()
        ],
        "targets": [{"component": own, **entry} for own, document in found.items() for entry in document["targets"]],
    }


def _plan_all(
    components: Mapping[str, Component],
    adapters: Mapping[str, Adapter],
    *,
    name: str,
    max_rank: int | None,
    unused: Unused,
    exclude: Sequence[str],
    choice: Quantisation | None,
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
    adapters, names = _settle_unread(adapters, names, known, unused, name)
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
            choice=choice,
        )
    if choice is not None:
        check_packed([plan.packs for plan in plans.values()], choice, f"the components of bundle {name!r}")
    return plans, adapters


def _settle_unread(
    adapters: Mapping[str, Adapter],
    names: Mapping[str, frozenset[str]],
    known: Mapping[str, frozenset[str]],
    unused: Unused,
    bundle: str,
) -> tuple[dict[str, Adapter], dict[str, frozenset[str]]]:
    """Leave out changes of weights that no component reads, or leave them to a component, which refuses them."""
    read = frozenset[str]().union(*names.values())
    idle = {task: [n for n in changed_names(adapter) if n not in read] for task, adapter in adapters.items()}
    if unused == "skip":
        base = f"the components of bundle {bundle!r}"
        kept = {task: leave_out(adapter, idle[task], task=task, base=base) for task, adapter in adapters.items()}
        return kept, dict(names)
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
        text = f"{component}: {stage}"
        progress(stage.renamed(text) if isinstance(stage, Stage) else text)

    return begin

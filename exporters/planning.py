"""Plan of an export before anything is written: the base traced, targets resolved, sizes known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.bundle import fit, slots
from tpeft_deploy.bundle.directory import check_task
from tpeft_deploy.bundle.manifest import Manifest, Port, Varies, Weight, check_name
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.errors import UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.branches import attach_banked
from tpeft_deploy.exporters.graph import picked_rows, quantised
from tpeft_deploy.exporters.graph.batch_axes import AxisOrder
from tpeft_deploy.exporters.graph.resolve import held_by, resolve
from tpeft_deploy.exporters.graph.unused import Unused, drop_unused
from tpeft_deploy.exporters.graph.weights_and_shapes import complete_shapes, held_tensor, lay_out, prepare
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.oracle.bfloat16 import wide
from tpeft_deploy.exporters.proof.padding import declare
from tpeft_deploy.exporters.quantisation.dequantised import check_packed, quantise_plan
from tpeft_deploy.exporters.quantisation.packs import Pack, Quantisation
from tpeft_deploy.exporters.resizing import fit_vocabulary
from tpeft_deploy.exporters.targets import activations, plan, plan_all, without
from tpeft_deploy.progress import Progress, silent
from tpeft_deploy.ties import settle
from tpeft_deploy.tucker import Array
from tpeft_deploy.version import __version__

__all__ = ["Need", "Plan", "Traced", "check_tasks", "plan_bundle", "plan_traced", "port", "trace"]

_ORDERS: tuple[AxisOrder, ...] = ("major", "minor", "shared")


@dataclass(frozen=True)
class Need:
    """Feeds of one task for one target: the sizes of its slots' letters, e.g. {"R_i": 8, "R_o": 16}, and bytes."""

    ranks: Mapping[str, int]
    bytes: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A bundle before it is written.

    Args:
        base: loaded, and fitting all adapters.
        raw: its graph, every product with its shape.
        resolved: weight -> initializer that holds it.
        adapters: task -> adapter.
        draft: the manifest, without files, and without what only the graphs tell: how outputs vary, rows, padding.
        padding: padding by input name that the user declares, not proved yet; None leaves it to the base.
        choice: quantisation that the user asked for; the base then has the values that the packs stand for, as its
            raw graph has.
        packs: initializer -> quantised weight.
    """

    base: Base
    raw: ir.Model
    resolved: Mapping[str, str]
    adapters: Mapping[str, Adapter]
    draft: Manifest
    padding: Mapping[str, int | float] | None = None
    choice: Quantisation | None = None
    packs: Mapping[str, Pack] = field(default_factory=dict)

    @property
    def base_bytes(self) -> int:
        """Bytes of all weights of the base, which the graphs share."""
        return self.draft.weight_bytes + sum(pack.nbytes for pack in self.packs.values())

    def needs(self, task: str) -> dict[str, Need]:
        """Feeds of a task: target key -> ranks and bytes; a target that it leaves alone is absent.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch, AdapterError: the bundle would refuse the adapter.
        """
        filled = fit.fill(
            self.draft, self.adapters[task], bundle=self.draft.name, base_value=lambda name: self.base.weights[name]
        )
        return {
            target.key: Need(slots.ranks_of(target, own), sum(array.nbytes for array in own.values()))
            for target in self.draft.targets
            for own in [dict[str, Array](filled.get(target.key, {}))]
            if own
        }

    def grouped(self) -> list[str]:
        """Weights that take one adapter per run wherever the rows are; others are found by a run of the base."""
        values = activations(self.raw.graph, self.draft.targets)
        found = [
            set(attach_banked.attach(self.raw.clone(), self.draft.targets, dict.fromkeys(values, order)))
            for order in _ORDERS
        ]
        return [target.name for target in self.draft.targets if all(target.name in single for single in found)]

    def to_json(self) -> dict[str, Any]:
        """Document that a dry run prints: `rows` of bundle and target is "group", or None where only running tells."""
        grouped = self.grouped()
        needs = {task: self.needs(task) for task in self.adapters}
        return {
            "name": self.draft.name,
            "base": self.base.name,
            "rows": "group" if grouped else None,
            "rows_reason": attach_banked.reason_of(list(dict.fromkeys(grouped))),
            "base_bytes": self.base_bytes,
            "tasks": [
                {
                    "task": task,
                    "parameters": adapter.parameters,
                    "bytes": adapter.nbytes,
                    "slot_bytes": sum(need.bytes for need in needs[task].values()),
                    "share": adapter.nbytes / self.base_bytes,
                }
                for task, adapter in self.adapters.items()
            ],
            "targets": [
                {
                    "target": target.name,
                    "kind": target.kind,
                    "shape": list(target.shape),
                    "dtype": target.dtype,
                    "rows": "group" if target.name in grouped else None,
                    "ranks": {task: dict(own[target.key].ranks) for task, own in needs.items() if target.key in own},
                    "bytes": {task: own[target.key].bytes for task, own in needs.items() if target.key in own},
                }
                for target in self.draft.targets
            ],
        }


@dataclass(frozen=True, eq=False)
class Traced:
    """A base with its raw graph, and weight -> initializer that holds it."""

    base: Base
    raw: ir.Model
    resolved: Mapping[str, str]


def plan_bundle(
    base: object,
    adapters: Mapping[str, Adapter],
    *,
    name: str,
    max_rank: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    weights: object = None,
    rename: Mapping[str, str] | None = None,
    padding: Mapping[str, int | float] | None = None,
    resize_embeddings: bool = False,
    unused: Unused = "error",
    exclude: Iterable[str] = (),
    generation: bool = False,
    choice: Quantisation | None = None,
    progress: Progress = silent,
) -> Plan:
    """Plan an `export_bundle` with the same arguments; `choice` is its quantisation.

    Raises:
        BundleError: a name is not allowed.
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch: the base cannot be exported, an adapter does not
            fit it, or an input cannot be padded.
        UnsupportedTarget: an adapter changes an excluded weight.
    """
    check_tasks(name, adapters)
    loaded = load_base(
        base,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        weights=weights,
        rename=rename,
        generation=generation,
    )
    loaded = fit_vocabulary(loaded, adapters) if resize_embeddings else loaded
    loaded = loaded.knowing(adapters.values())
    for adapter in adapters.values():
        loaded.check(adapter)
    plan = plan_traced(
        trace(loaded, progress),
        adapters,
        name=name,
        max_rank=max_rank,
        padding=padding,
        unused=unused,
        exclude=exclude,
        every=not adapters,
        choice=choice,
    )
    if choice is not None:
        check_packed([plan.packs], choice, loaded.name)
    return plan


def check_tasks(name: str, tasks: Iterable[str]) -> None:
    """Check the names of a bundle and its tasks.

    Raises:
        BundleError: a name is not allowed.
    """
    check_name(name, "bundle")
    for task in tasks:
        check_task(task, name)


def trace(base: Base, progress: Progress) -> Traced:
    """Trace a base and find its weights in the graph.

    Raises:
        UnsupportedBase: the base cannot be exported, or has no batch.
    """
    _check_batch(base)
    progress("trace the base")
    raw = base.graph()
    complete_shapes(raw.graph)
    progress("resolve the targets")
    return Traced(base, raw, resolve(raw.graph, base.weights, base.aliases))


def plan_traced(
    traced: Traced,
    adapters: Mapping[str, Adapter],
    *,
    name: str,
    max_rank: int | None,
    padding: Mapping[str, int | float] | None,
    unused: Unused,
    exclude: Iterable[str],
    every: bool,
    choice: Quantisation | None = None,
) -> Plan:
    """Plan the graphs of a traced base; arguments and errors as for `plan_bundle`.

    Args:
        every: whether every linear and conv weight gets a branch, rather than those that the adapters change.
        choice: quantisation; a base with nothing to quantise is not refused.
    """
    loaded, raw, resolved = traced.base, traced.raw, traced.resolved
    adapters = drop_unused(loaded, adapters, resolved) if unused == "skip" else adapters
    certain = {weight: held for weight, held in resolved.items() if loaded.proves(weight)}
    known = {
        task: settle(adapter, certain, loaded.ties, doing=f"export adapter {task!r} for {loaded.name}")
        for task, adapter in adapters.items()
    }
    free, resized = set[str](), set[str]()
    for task, adapter in known.items():
        for weight, array in adapter.served_overrides.items():
            held = held_by(certain, weight, doing=f"export adapter {task!r} for {loaded.name}")
            free.add(held)
            resized |= {held} if array.shape != loaded.weights[weight].shape else set()
    raw = prepare(raw, resolved.values(), sorted(free), resized)
    targets = plan_all(raw.graph, certain) if every else plan(raw.graph, known, certain, base=loaded.name)
    targets = without(targets, exclude, resolved, base=loaded.name, given=not every)
    ties = tuple(tuple(group) for group in loaded.ties if any(weight in resolved for weight in group))
    packs: dict[str, Pack] = {}
    if choice is not None:
        whole = {target.name for target in targets if target.kind in ("override", "weight")}
        loaded, packs = quantise_plan(loaded, raw.graph, resolved, choice, skip=whole)
    draft = replace(
        _draft(raw.graph, resolved, targets, name=name, max_rank=max_rank, packs=packs),
        ties=ties,
        decoder=loaded.decoder,
    )
    declare(draft, padding or {}, loaded.name)
    return Plan(loaded, raw, resolved, adapters, draft, padding, choice if packs else None, packs)


def port(value: ir.Value, varies: Varies | None) -> Port:
    """An input or output of a graph as a manifest describes it.

    Raises:
        UnsupportedTarget: it has no shape.
    """
    if value.shape is None or value.dtype is None:
        raise UnsupportedTarget(f"describe input or output {value.name!r}", problem="the exporter gave it no shape")
    shape = tuple(
        size if isinstance(size, int) else str(size.value or f"{value.name}.{axis}")
        for axis, size in enumerate(value.shape)
    )
    return Port(str(value.name), value.dtype.numpy().name, shape, varies)


def _draft(
    graph: ir.Graph,
    resolved: Mapping[str, str],
    targets: list[Target],
    *,
    name: str,
    max_rank: int | None,
    packs: Mapping[str, Pack],
) -> Manifest:
    digests = dict(_digests(graph, [held for held in resolved.values() if held not in packs]))
    packed = {held: Weight(tuple(pack.value.shape), "float32", pack.digest, 0, 0) for held, pack in packs.items()}
    limits = picked_rows.limits(graph, frozenset(t.name for t in targets if t.kind == "override"))
    return Manifest(
        name=name,
        producer=f"tpeft-deploy {__version__}",
        weights=lay_out(graph, digests) | packed,
        aliases={alias: held for alias, held in resolved.items() if alias != held},
        targets=tuple(targets),
        rows="each",
        rows_reason="",
        inputs=tuple(replace(port(value, None), below=limits.get(str(value.name))) for value in graph.inputs),
        outputs=tuple(port(value, None) for value in graph.outputs),
        files={},
        max_rank=max_rank,
    )


def _digests(graph: ir.Graph, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in sorted(set(names)):
        held = name in graph.initializers
        yield name, weight_digest(wide(held_tensor(graph, name))) if held else quantised.held_digest(graph, name)


def _check_batch(base: Base) -> None:
    if not base.batched:
        raise UnsupportedBase(
            f"export bundle of {base.name}",
            expected="an input with a dynamic first axis: the batch, each row of which selects an adapter",
            got="dynamic_shapes that fix it for all inputs",
            fix="Leave dynamic_shapes out, or make axis 0 dynamic; export_folded takes fixed batches.",
        )

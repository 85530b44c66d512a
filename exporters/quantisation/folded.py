"""An adapter folded into its base, and the result quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import onnx
import onnx_ir as ir

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.bundle.quantised import Quantised
from tpeft_deploy.exporters.graph.merged_weights import held_changes
from tpeft_deploy.exporters.graph.resolve import resolve
from tpeft_deploy.exporters.graph.weights_and_shapes import held_tensor
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.oracle.limits import ErrorLimits
from tpeft_deploy.exporters.oracle.source import Evidence
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.quantisation.dequantised import check_packed
from tpeft_deploy.exporters.quantisation.deviation import measure_deviation
from tpeft_deploy.exporters.quantisation.packs import BLOCK, Pack, Quantisation, pack_weights, quantisable
from tpeft_deploy.ties import changed_names

__all__ = ["FoldedPacks", "describe", "pack_folded", "reading_checks"]


@dataclass(frozen=True, eq=False)
class FoldedPacks:
    """Merged weights, quantised.

    Args:
        choice: form of quantisation.
        packs: initializer -> pack of its merged value.
        adapter: overrides with the values that the packs stand for, and what is left of the adapter.
    """

    choice: Quantisation
    packs: dict[str, Pack]
    adapter: Adapter


def pack_folded(base: Base, raw: ir.Model, adapter: Adapter, choice: Quantisation) -> FoldedPacks:
    """Merge an adapter into the weights of a prepared graph, which is left as it is, and quantise them.

    Raises:
        UnsupportedBase: there is nothing to quantise, or the base is not in float32.
    """
    graph, own = raw.clone().graph, held_changes(base, raw.graph, adapter)
    resolved = resolve(raw.graph, base.weights, base.aliases)
    names = quantisable(graph, resolved, choice, base=base, skip=own.overrides)
    changed = set(changed_names(own))
    for name in changed & set(names):
        merged = base.merged(own, name).astype(held_tensor(graph, name).dtype.numpy())
        graph.initializers[name].const_value = ir.tensor(merged, name=name)
    digests = {name: weight_digest(held_tensor(graph, name).numpy()) for name in names}
    packs = pack_weights(graph, names, choice, digests)
    check_packed([packs], choice, base.name)
    left = Adapter(
        {name: delta for name, delta in own.deltas.items() if name not in packs},
        {**own.overrides, **{name: pack.value for name, pack in packs.items()}},
        source=f"{adapter.source}, quantised",
        gains={name: gain for name, gain in own.gains.items() if name not in packs},
    )
    return FoldedPacks(choice, packs, left)


def reading_checks(
    subject: Subject, adapter: Adapter, source: Evidence, limit: ErrorLimits, *, task: str
) -> Iterator[Check]:
    """Compare the merged base, before it is quantised, with the training library."""
    for sizes, outputs in source.outputs:
        answer = partial(subject.reference, adapter, sizes)
        yield compare.measure("merged", task, sizes, answer, outputs, limit, source.oracle)


def describe(subject: Subject, adapter: Adapter, found: FoldedPacks, file: Path) -> None:
    """Write the distance from the model in floating point into the metadata of a file, as `tpeft.quantised`."""
    record = Quantised(
        form=found.choice.form,
        block=BLOCK,
        activations=found.choice.activations,
        weights=tuple(found.packs),
        bytes=sum(pack.nbytes for pack in found.packs.values()),
        outputs=measure_deviation(subject, file, adapter),
    )
    model = onnx.load(file, load_external_data=False)
    model.metadata_props.add(key="tpeft.quantised", value=msgspec.json.encode(record).decode())
    onnx.save(model, file)

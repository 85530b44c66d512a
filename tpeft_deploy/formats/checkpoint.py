"""From a training side's tensors to an adapter: cut into modules, ask the readers, account for every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

from tpeft_deploy import algebra
from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.algebra import DENSE
from tpeft_deploy.errors import FormatError, ShapeError
from tpeft_deploy.formats.peft import refusals as peft_refusals
from tpeft_deploy.formats.read.module import BaseView, Change, Checkpoint, Module
from tpeft_deploy.formats.read.names import PEFT_PREFIX, Names, inner
from tpeft_deploy.formats.read.parts import cut_saved, prefixes
from tpeft_deploy.formats.read.saved import Saved, configured
from tpeft_deploy.formats.reader import FormatReader
from tpeft_deploy.formats.readers import READERS, WHOLE_MODEL
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["methods", "read"]

_FLORA = ".flora_layer."
_WRAPPER = "model."  # FLoRA's own wrapper puts it before every key


@dataclass(eq=False)
class _Parts:
    """What has been read so far, by whole names of the base."""

    deltas: dict[str, TuckerDelta] = field(default_factory=dict)
    overrides: dict[str, Array] = field(default_factory=dict)
    gains: dict[str, Array] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def read(
    saved: Saved, *, scale: float | None, base: BaseView | None, format: str | None = None, part: str | None = None
) -> Adapter:
    """The adapter in a training side's tensors.

    Args:
        saved: tensors and configuration on disk.
        scale: the caller's, for formats that record none.
        base: model to resolve names against; some formats cannot be read without it.
        format: the one reader to ask; all of them when left out.
        part: prefix of the names that are read; the others are left out.

    Raises:
        FormatError: a tensor that no reader understands, tensors that do not fit each other, a method that is
            refused, a base or scale that is missing, or a scale that is not needed.
        UnknownTarget: a module that the base does not have.
    """
    parts_there, left_out = partial(prefixes, saved.tensors), dict[str, str]()
    if part is not None:
        saved, left_out = cut_saved(saved, part, shared=_is_shared)
    saved = configured(saved)
    peft_refusals.refuse(saved.config, saved.source)
    readers = [reader for reader in READERS if format in (None, reader.name)]
    weights = base.names if base else frozenset[str]()
    names = Names(saved.source, base.name if base else None, weights, part or "", parts_there)
    checkpoint = Checkpoint(saved.source, saved.config, saved.metadata, scale, base, part=part or "")
    modules, rest = _cut(saved, names, checkpoint)
    checkpoint.trained.update((module.name, inner(module.key).removeprefix(PEFT_PREFIX)) for module in modules)
    parts, asked, adapted = _Parts(), set[str](), set[str]()
    marked = _marked(readers, modules)
    for module in modules:
        reader = _reader_of(module, marked)
        if reader is None:
            rest |= {_key(module.key, suffix): tensor for suffix, tensor in module.tensors.items()}
            continue
        asked.add(reader.name)
        adapted.add(module.name)
        _add(parts, _change(reader, module), module)
    _check_recognised(checkpoint, asked, directory=saved.directory)
    _check_shared(checkpoint, readers, asked)
    _check_beside(rest, names, adapted, checkpoint)
    _account_for(rest, parts, names, checkpoint, whole=bool(asked & WHOLE_MODEL), directory=saved.directory)
    _check_scale_used(checkpoint, parts)
    _note_no_effect(parts, saved.source)
    return Adapter(
        parts.deltas, parts.overrides, parts.digests, saved.source, parts.gains, parts.notes, left_out=left_out
    )


def methods(saved: Saved, *, base: BaseView | None, format: str | None = None) -> dict[str, int]:
    """Which reader would read how many of the modules; nothing is read, and nothing refused."""
    names = Names(saved.source, base.name, base.names) if base else Names(saved.source)
    peft_refusals.check_fields(saved.config, saved.source)
    modules, _ = _cut(saved, names, Checkpoint(saved.source, saved.config, saved.metadata, None, base))
    readers = [reader for reader in READERS if format in (None, reader.name)]
    marked = _marked(readers, modules)
    found = (_reader_of(module, marked) for module in modules)
    return dict(Counter(reader.name for reader in found if reader is not None))


_Marked = Mapping[frozenset[str], Sequence[FormatReader]]


def _marked(readers: Sequence[FormatReader], modules: Sequence[Module]) -> _Marked:
    """Suffixes of a module -> the readers with a mark among them."""
    kinds = {frozenset(module.tensors) for module in modules}
    return {kind: [reader for reader in readers if not reader.marks.isdisjoint(kind)] for kind in kinds}


def _reader_of(module: Module, marked: _Marked) -> FormatReader | None:
    """The first reader that matches, of those with a mark in the module."""
    for reader in marked[frozenset(module.tensors)]:
        if reader.matches(module):
            return reader
    return None


@cache
def _suffixes() -> tuple[Set[str], Set[str], Set[str]]:
    """Of all readers: suffixes after a dot, suffixes joined to the module's name, and whole keys of shared tensors."""
    joined = frozenset[str]().union(*(reader.joined_suffixes for reader in READERS))
    shared = frozenset[str]().union(*(reader.shared for reader in READERS))
    return frozenset[str]().union(*(reader.suffixes for reader in READERS)) - joined, joined, shared


def _cut(saved: Saved, names: Names, checkpoint: Checkpoint) -> tuple[list[Module], dict[str, Array]]:
    """Modules in the order of their keys, and tensors with a suffix that no reader knows; fills `checkpoint.shared`."""
    modules: dict[str, Module] = {}
    rest: dict[str, Array] = {}
    wrapped = any(_FLORA in key for key in saved.tensors) and all(key.startswith(_WRAPPER) for key in saved.tensors)
    for key, tensor in sorted(saved.tensors.items()):
        if _is_shared(key):
            checkpoint.shared[key] = tensor
            continue
        place = _split(key)
        if place is None:
            rest[key] = tensor
            continue
        module, suffix = place
        if module not in modules:
            known = module.removeprefix(_WRAPPER) if wrapped and names.base is None else module
            modules[module] = Module(names.module(known), {}, module, checkpoint)
        modules[module].tensors[suffix] = tensor
    _check_twice(saved)
    return list(modules.values()), rest


def _is_shared(key: str) -> bool:
    return key in _suffixes()[2] or key.startswith(_shared_prefixes())


@cache
def _shared_prefixes() -> tuple[str, ...]:
    return tuple(prefix for reader in READERS for prefix in reader.shared_prefixes)


@cache
def _joined() -> tuple[str, ...]:
    return tuple(_suffixes()[1])


@cache
def _most_dots() -> int:
    return 1 + max(suffix.count(".") for suffix in _suffixes()[0])


def _split(key: str) -> tuple[str, str] | None:
    """A key as module and suffix, the longest suffix that a reader knows."""
    dotted, joined, _ = _suffixes()
    # First, as they end in "weight", which is also a separate dotted suffix.
    if key.endswith(_joined()):
        suffix = max((s for s in joined if key.endswith(s) and len(key) > len(s)), key=len, default=None)
        if suffix is not None:
            return key.removesuffix(suffix), suffix
    names = key.rsplit(".", _most_dots())
    for first in range(1, len(names)):
        suffix = ".".join(names[first:])
        if suffix in dotted:
            return key.removesuffix(f".{suffix}"), suffix
    return None


def _key(module: str, suffix: str) -> str:
    return f"{module}{suffix}" if suffix in _suffixes()[1] else f"{module}.{suffix}"


def _check_twice(saved: Saved) -> None:
    for key in saved.tensors:
        if key.startswith(PEFT_PREFIX) and key.removeprefix(PEFT_PREFIX) in saved.tensors:
            raise FormatError(
                f"read {saved.source}, tensor {key!r}", problem=f"it is there without {PEFT_PREFIX!r} too"
            )


def _change(reader: FormatReader, module: Module) -> Change:
    doing = f"{module.doing} as {reader.name}"
    _check_values(reader, module, doing)
    try:
        change = reader.read(module)
    except MemoryError as error:
        raise FormatError(
            doing,
            problem="its tensors claim a change that is larger than the memory there is",
            fix="Give base=, with which sizes are checked first.",
        ) from error
    except (ShapeError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Errors that a reader does not expect also come from damaged files.
        raise FormatError(
            doing,
            problem=f"its tensors do not fit each other ({error})",
            fix="Check that the file is whole and was trained on this base.",
        ) from error
    if module.tensors:
        raise FormatError(
            f"{doing}, tensor {min(module.tensors)!r}",
            problem="nothing is known of it",
            fix="The module was written by a newer version of its library, or by another tool.",
        )
    return change


def _check_values(reader: FormatReader, module: Module, doing: str) -> None:
    """Refuse a tensor without values: its other sizes may claim any rank."""
    for suffix, tensor in module.tensors.items():
        if tensor.size == 0 and suffix in reader.suffixes - reader.may_be_empty:
            raise FormatError(
                f"{doing}, tensor {suffix!r}",
                expected=f"values in {suffix}",
                got=f"none, of shape {tensor.shape}",
                fix="The file is not whole: save or copy the adapter again.",
            )


def _add(parts: _Parts, change: Change, module: Module) -> None:
    twice = [
        *(parts.deltas.keys() & change.deltas.keys()),
        *(parts.overrides.keys() & change.overrides.keys()),
        *(parts.gains.keys() & change.gains.keys()),
    ]
    if twice:
        raise FormatError(module.doing, problem=f"{min(twice)!r} is changed twice in this file")
    parts.deltas.update(change.deltas)
    parts.overrides.update(change.overrides)
    parts.gains.update(change.gains)
    parts.notes.update(change.notes)
    parts.digests.update(change.digests)
    for name, delta in change.deltas.items():
        try:
            small = algebra.smaller(delta)
        except ValueError as error:
            raise FormatError(
                module.doing,
                expected=f"a change that {delta.core.dtype} can hold",
                got=f"one that is not finite ({error})",
            ) from error
        if small is not delta:
            parts.deltas[name] = small
            parts.notes[name] = "; ".join(filter(None, [change.notes.get(name), DENSE]))


def _check_recognised(checkpoint: Checkpoint, asked: Set[str], *, directory: bool) -> None:
    """Refuse a PEFT directory of an unknown method: its tensors would be read as overrides."""
    if directory and not asked:
        raise FormatError(
            f"read {checkpoint.source}",
            expected=f"modules in a format of {', '.join(reader.name for reader in READERS)}",
            got=f"a PEFT adapter of peft_type {checkpoint.config.get('peft_type')!r} without any",
            fix="Merge it with PEFT's merge_and_unload and export the merged model as a separate base.",
        )


def _check_beside(rest: Mapping[str, Array], names: Names, adapted: Set[str], checkpoint: Checkpoint) -> None:
    """Refuse tensors of an adapted module that no reader took and that are no parameters of the layer."""
    lengths = sorted({len(name) for name in adapted}, reverse=True)
    for key in sorted(rest):
        name = names.weight(key)
        above = next((name[:n] for n in lengths if name[n : n + 1] == "." and name[:n] in adapted), None)
        if above is None or ".base_layer." in key:
            continue
        inside = name.removeprefix(f"{above}.")
        if not inside.endswith(("bias", "weight")) or "lora_" in inside or inside.count(".") > 1:
            raise FormatError(
                f"read {checkpoint.source}, tensor {key!r}",
                problem=f"nothing is known of it, and module {above!r} is adapted",
                fix="The module was written by a newer version of its library, or by another tool.",
            )


def _check_shared(checkpoint: Checkpoint, readers: Sequence[FormatReader], asked: Set[str]) -> None:
    used = frozenset[str]().union(*(r.shared for r in readers if r.name in asked))
    for key in sorted(checkpoint.shared.keys() - used - checkpoint.used):
        raise FormatError(f"read {checkpoint.source}, tensor {key!r}", problem="no module of the file uses it")


def _account_for(
    rest: Mapping[str, Array], parts: _Parts, names: Names, checkpoint: Checkpoint, *, whole: bool, directory: bool
) -> None:
    """Turn the tensors of no reader into overrides, or refuse them.

    A copy of an adapted weight is the base of the training: its digest is recorded, so that any other base is refused.
    """
    for key, tensor in sorted(rest.items()):
        name = names.weight(key.removeprefix(_WRAPPER) if whole and names.base is None else key)
        if (name in parts.deltas or name in parts.gains) and (whole or ".base_layer." in key):
            parts.digests[name] = weight_digest(tensor)
        elif not (whole or directory):
            raise FormatError(
                f"read {checkpoint.source}, tensor {key!r}",
                expected="a tensor of a format that this version reads",
                got=f"a name that none of them has, of shape {tensor.shape}",
                fix="Nothing is left out silently: take it out of the file if it is no part of the adapter.",
            )
        elif name in parts.overrides:
            raise FormatError(f"read {checkpoint.source}, tensor {key!r}", problem=f"{name!r} is replaced twice")
        elif not (whole and checkpoint.base and _is_base(tensor, name, checkpoint.base)):
            parts.overrides[name] = tensor
    if whole and checkpoint.base is None and parts.overrides:
        parts.notes["*"] = "the file holds the whole model; give base= to leave out what training did not change"


def _is_base(tensor: Array, name: str, base: BaseView) -> bool:
    return name in base.weights and bool(np.array_equal(tensor, base.weights[name]))


def _check_scale_used(checkpoint: Checkpoint, parts: _Parts) -> None:
    if checkpoint.scale is not None and (checkpoint.config or not parts.deltas):
        raise FormatError(
            f"read {checkpoint.source}",
            expected="no scale, as the adapter records it" if parts.deltas else "no scale, as nothing is scaled",
            got=f"scale={checkpoint.scale}",
            fix="Leave scale out.",
        )


def _note_no_effect(parts: _Parts, source: str) -> None:
    if not parts.deltas and not parts.overrides and not parts.gains:
        return  # Adapter itself refuses it
    changes = parts.overrides or any(not algebra.is_zero(delta) for delta in parts.deltas.values())
    if not changes and all((gain == 1).all() for gain in parts.gains.values()):
        parts.notes["*"] = "it changes nothing: every change in it is zero, as before any training"

"""Prove that rows may be padded to one length: every answer, cut back, is the one of the row alone.

The padding value stands in the manifest (`Port.pad`), and only there may a runtime join requests of different lengths.
A mask that hides the padding makes it so; a mean over the sequence, or a second convolution over time, sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import islice

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import NotEquivalent, UnsupportedBase
from tpeft_deploy.exporters.causes import said_by
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Outputs
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.oracle.limits import limit_of
from tpeft_deploy.exporters.oracle.subject import Sizes, Subject
from tpeft_deploy.exporters.proof.bundle_graphs import BASE, banks, feeds_of
from tpeft_deploy.exporters.proof.forms_and_rows import base_limit, branch_limit, cut, probe, with_checks
from tpeft_deploy.exporters.proof.ragged_batches import Batch, Ragged
from tpeft_deploy.progress import Progress

__all__ = ["check_padding", "declare", "prove_padding"]

_log = logging.getLogger("tpeft_deploy.exporters")

Pad = int | float
_FIX = "The model reads what it is filled up with: leave it out of padding= (--pad), or give the model a mask."


def declare(draft: Manifest, padding: Mapping[str, Pad], base: str) -> Manifest:
    """Declare the padding of a manifest's inputs; nothing is proved by it.

    Args:
        draft: its inputs are the base's.
        padding: input name -> value.
        base: its name, for messages.

    Raises:
        UnsupportedBase: there is no such input, its dtype does not hold the value, or nothing of it can be filled up.
    """
    names = [port.name for port in draft.inputs]
    for name in padding:
        if name not in names:
            raise UnsupportedBase(f"pad input {name!r} of base {base}", expected=f"one of {', '.join(names)}")
    doing = {name: f"pad input {name!r} of base {base} with {value!r}" for name, value in padding.items()}
    inputs = [
        replace(port, pad=_held(port, padding[port.name], doing[port.name])) if port.name in padding else port
        for port in draft.inputs
    ]
    declared = replace(draft, inputs=tuple(inputs))
    for port in inputs:
        if port.pad is not None:
            _check_free(declared, port, doing[port.name])
    return declared


def prove_padding(
    subject: Subject,
    bundle: Bundle,
    manifest: Manifest,
    adapters: Mapping[str, Adapter],
    padding: Mapping[str, Pad] | None,
    progress: Progress,
) -> Manifest:
    """Prove the padding of a base's inputs; the manifest gains it, and its measurements.

    Args:
        subject: base; the padding that it declares itself is left out, with a warning, where the proof fails.
        bundle: written already.
        manifest: manifest with all that was proved before.
        adapters: task -> adapter.
        padding: padding that the user declares instead; None leaves it to the base.
        progress: called at the stage.

    Raises:
        UnsupportedBase: an input cannot be filled up as the user declares.
        NotEquivalent: an answer changes with what the user declares.
    """
    wanted = subject.base.padding if padding is None else padding
    if not wanted:
        return manifest
    progress("check rows that are filled up")
    try:
        declared = declare(manifest, wanted, subject.base.name)
        _check_example(subject, declared)
        checks = [_passed(check, subject, declared) for check in check_padding(subject, bundle, declared, adapters)]
    except (UnsupportedBase, NotEquivalent) as error:
        if padding is not None:
            raise
        _log.warning("rows of different lengths will not share a run: %s", error)
        return manifest
    return with_checks(declared, checks)


def check_padding(
    subject: Subject, bundle: Bundle, manifest: Manifest, adapters: Mapping[str, Adapter]
) -> Iterator[Check]:
    """Compare rows that are filled up, cut back to their lengths, with the merged base on the rows alone.

    All rows one and seven longer than the example, then rows of different lengths in one run: the base, the first of
    the adapters, and a random probe that changes every target, for the adapters that are added later.  As in
    `check_forms`, comparisons that failed are among those that come back; each is the worst of its rows.

    Args:
        subject: oracle.
        bundle: written already.
        manifest: manifest with declared padding.
        adapters: task -> adapter.

    Raises:
        NotEquivalent: the base itself does not take longer inputs than its example.
    """
    apart = [port.name for port in manifest.outputs if port.rows != "joint"]  # others are never filled up
    if not apart:
        return
    ragged = Ragged(subject, manifest)
    for sizes in ragged.longer:
        if not subject.takes(sizes):
            raise NotEquivalent(
                _doing(subject, manifest),
                expected=f"a base that runs at {_at(sizes)}, longer than its example",
                got="one that does not",
                fix="Give shorter example inputs.",
            )
    batches = ragged.batches()
    first = dict(islice(adapters.items(), 1))
    tasks: dict[str, Adapter | None] = {BASE_TASK: None, **first, "probe 0": probe(bundle, 0)}
    branches = branch_limit(subject, bundle, ragged.own)
    banked = banks(bundle, tasks)
    limits = {BASE: base_limit(subject, bundle), **dict.fromkeys(banked, branches)}
    sessions = {file: compare.open_session(bundle.path / file) for file in limits}
    for position, (task, adapter) in enumerate(tasks.items()):
        alone = [(sizes, subject.answer(adapter, ragged.rows(sizes))) for sizes in batches[-1].groups]
        alone = [(sizes, {name: answer[name] for name in apart}) for sizes, answer in alone]
        for batch in batches:
            inputs = ragged.joined(batch)
            expected = [next(answer for sizes, answer in alone if sizes == own) for own in batch.groups]
            for file, session in sessions.items():
                if file == BASE and adapter is not None:
                    continue
                feeds = feeds_of(file, banked[file], np.array([position])) if file in banked else {}
                run = cache(partial(compare.run, session, inputs, feeds))
                answers = partial(_answers, run, ragged, bundle, adapter, batch)
                yield _worst(
                    compare.measure("padded", task, batch.sizes, partial(answers, place), answer, limits[file])
                    for place, answer in enumerate(expected)
                )


def _answers(
    run: Callable[[], Outputs], ragged: Ragged, bundle: Bundle, adapter: Adapter | None, batch: Batch, place: int
) -> Outputs:
    return ragged.cut_back(cut(run(), bundle, adapter), batch, place)


def _held(port: Port, value: Pad, doing: str) -> Pad:
    """The value in the kind of an input's dtype."""
    dtype = np.dtype(port.dtype)
    number = value.item() if isinstance(value, np.generic) else value
    whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
    if whole and dtype.kind == "b" and number in (0, 1):
        return int(number)
    if whole and dtype.kind in "iu" and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        return int(number)
    if dtype.kind == "f" and isinstance(number, int | float) and abs(number) <= float(np.finfo(dtype).max):
        return number
    raise UnsupportedBase(doing, expected=f"a number that {port.dtype} holds", got=repr(value))


def _check_free(declared: Manifest, port: Port, doing: str) -> None:
    batch = declared.batch_axis
    free = {size for size in port.shape if isinstance(size, str) and size != batch}
    if port.shape[:1] != (batch,) or not free:
        raise UnsupportedBase(
            doing,
            expected="the batch as its first axis, and another axis that is free",
            got=f"shape {_shape(port)}",
            fix="Make the axis dynamic (dynamic_shapes), or leave the input out of padding= (--pad).",
        )
    if not free & declared.paddable:
        others = [f"{other.name} ({_shape(other)})" for other in declared.inputs if other.pad is None]
        raise UnsupportedBase(
            doing,
            expected=f"a free size of {_shape(port)} that every input which has it declares, and has by itself",
            got=f"none for {', '.join(others)}" if others else "sums or multiples of sizes",
            fix="Declare the other inputs too, or leave this one out.",
        )


def _shape(port: Port) -> str:
    return " x ".join(map(str, port.shape))


def _check_example(subject: Subject, manifest: Manifest) -> None:
    """Refuse an example that would prove nothing: no answer depends on its last entries.

    Raises:
        NotEquivalent: filling up in place of the last entries makes no difference, or the base fails on it.
    """
    ragged = Ragged(subject, manifest)
    whole = subject.answer(None, ragged.rows(ragged.own))
    for free in sorted(manifest.paddable):
        shorter = ragged.filled(ragged.own | {free: ragged.own[free] - 1}, ragged.own)
        doing = f"{_doing(subject, manifest)}, the last of {free} {ragged.own[free]} in the example"
        try:
            got = subject.answer(None, shorter)
        except Exception as error:  # models raise every kind of exception; the cause is kept
            raise NotEquivalent(doing, problem=f"the base does not run on it ({said_by(error)})") from error
        if all(compare.relative_error(got[name], whole[name]) <= limit_of(subject.graph) for name in whole):
            raise NotEquivalent(
                doing,
                expected="answers that depend on it",
                got="the same ones without it",
                fix="Give example inputs with a mask that hides nothing, and without padding at the end.",
            )


def _worst(checks: Iterable[Check]) -> Check:
    found = list(checks)
    failed = next((check for check in found if check.failure is not None), None)
    return failed or max(found, key=lambda check: check.error)


def _passed(check: Check, subject: Subject, manifest: Manifest) -> Check:
    failure = check.failure
    if failure is None:
        return check
    measured = f"expected {failure.expected}, got {failure.got}" if failure.problem is None else failure.problem
    raise NotEquivalent(
        _doing(subject, manifest),
        problem=f"the answers of task {check.task!r} change at {_at(check.sizes)} ({measured})",
        fix=_FIX,
    ) from failure


def _doing(subject: Subject, manifest: Manifest) -> str:
    pads = ", ".join(f"{port.name} with {port.pad}" for port in manifest.inputs if port.pad is not None)
    return f"pad {pads} of base {subject.base.name} along {', '.join(sorted(manifest.paddable))}"


def _at(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())

"""Errors of an encoder's answers, and what its forms cost on real texts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from transformers.utils import logging

from examples.families.answers import LIMIT, error
from examples.families.figures import Measured, gate
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime.bench.cases import PlainSessions, fold_copy
from tpeft_deploy.runtime.bench.measure import interleave
from tpeft_deploy.runtime.sessions.providers import choose
from tpeft_deploy.tucker import Array


def quiet() -> None:
    """Leave out what transformers says of a new head, and its progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def worst(found: Iterable[Array], wanted: Iterable[Array]) -> float:
    """Largest error of a row."""
    return max(error(one, other) for one, other in zip(found, wanted, strict=True))


def exported(bundle: Bundle, cost: Measured, errors: Mapping[str, float]) -> dict[str, Any]:
    """Figures of an export, which PEFT's forward has checked.

    Args:
        bundle: exported bundle.
        cost: cost of the export.
        errors: errors of answers against PEFT's merged models.
    """
    assert {bundle.oracle(task)["oracle"] for task in bundle.tasks} == {f"peft {version('peft')}"}
    assert max(errors.values()) <= LIMIT, errors
    factors = {task: bundle.factors(task, "factored.onnx").values() for task in bundle.tasks}
    return {
        "weights, MB": bundle.manifest.files["weights.data"].bytes / 1e6,
        "adapters, kB": {task: sum(own.nbytes for own in arrays) / 1e3 for task, arrays in factors.items()},
        "export, s": cost.seconds,
        "export, MB of memory": cost.megabytes,
        "export, relative error": gate(bundle),
        "answers, relative error": dict(errors),
    }


def text_forms(
    bundle: Bundle, inputs: Mapping[str, Array], tasks: Sequence[str], counts: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Milliseconds of a run in each form on one thread, and the ratio to the plain base, on real texts in turns.

    Args:
        bundle: bundle.
        inputs: rows of texts, padded.
        tasks: tasks of the rows in mixed runs; the first one is that of the other forms.
        counts: rows of a batch.
        seconds: for each count.
    """
    plain, first = PlainSessions(bundle, choose("cpu"), 1), tasks[0]
    found = []
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        folded = fold_copy(bundle, runtime)
        assert isinstance(folded, str), folded
        for count in counts:
            rows = {name: own[:count] for name, own in inputs.items()}
            cases: dict[str, Callable[[], object]] = {
                "plain base": plain.base(rows),
                "folded": partial(runtime.run, rows, folded),
                "factored": plain.factored(first, rows),
                "banked, one task": partial(runtime.run, rows, first),
                "banked, mixed": partial(runtime.run, rows, tasks=tasks[:count]),
            }
            ms = {name: 1e3 * statistics.median(own) for name, own in interleave(cases, seconds).items()}
            ratio = {f"{name}, ratio": own / ms["plain base"] for name, own in ms.items() if name != "plain base"}
            found.append({"rows": count, "tokens": rows["input_ids"].shape[1], **ms, **ratio})
    return found

"""The table of toolkits that answer the same batch in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from benchmarks.tables import peer_cases, peer_generation
from benchmarks.tables.peer_cases import OURS, Answer, Batch
from benchmarks.tables.peer_losses import losses
from benchmarks.tables.peer_models import WORKS, Size, Work
from benchmarks.tables.table import Figure, Row, Settings, Table, race
from tpeft_deploy.tucker import Array

__all__ = ["compare", "measure"]

COUNTS = (1, 4, 16)
GENERATION = "decoder"
TEXT = """\
A batch of 16 rows whose adapters differ, answered by toolkits that run in one process: a BERT encoder of 6 layers of
384 with 8 or 64 tokens a row, 6 convolutions of 64 channels with batch normalisation on 32 x 32 pixels, and a Llama of
5 layers of 256 that generates 16 tokens behind prompts of 8, greedily.  Adapters are LoRA of rank 8 on every linear and
convolution, written by PEFT.  Rows of 1, 4 or 16 adapters alternate in the batch.

"ratio" is the time of the row divided by that of this toolkit's mixed batch in the same round: above 1 the row is
slower.  "ms" is the time of the whole batch.  All are medians with quartiles; cases take turns in one process, and
every library has the same number of threads.  Splitting the batch into rows of one adapter, and putting the answers
together again, counts.

Before anything is timed, each whole answer is compared with PEFT's, computed row by row with set_adapter: within 1e-4
of its largest value, and all tokens of the decoder.

"a session for each adapter" runs the merged models as ONNX files in ONNX Runtime's sessions, so its memory grows with
the adapters; "add_active_adapter" runs the graph with optional inputs and the adapter files that bundles have.  Both
take one adapter a run, as onnxruntime-genai does, which generates the rows of one adapter together.  polylora replaces
linear layers only, and has kernels for CUDA only: on a processor it runs its reference in torch, row by row.
"""

Answers = Callable[[Batch], AbstractContextManager[dict[str, Answer | str]]]


def measure(settings: Settings) -> Table:
    """Compare all models at full size."""
    return compare(settings, Size(), COUNTS)


def compare(settings: Settings, size: Size, counts: Sequence[int], *, generation: bool = True) -> Table:
    """The table for models of a size.

    Args:
        settings: cache, threads and seconds of a comparison.
        size: size of the model.
        counts: numbers of adapters in a batch.
        generation: also compare toolkits that generate.

    Raises:
        Difference: a toolkit's answer is not PEFT's.
    """
    figures: dict[str, dict[str, Figure]] = {}
    with _threads(settings.threads):
        for name, (kind, tokens) in WORKS.items():
            work = Work(settings.cache, kind, size)
            answers = partial(peer_cases.answers, work, threads=settings.threads)
            for count in counts:
                batch = Batch.of(work, tokens, count)
                _add(figures, name, count, _raced(settings, answers, batch, peer_cases.oracle(work, batch)))
        if generation:
            decoder = peer_generation.Generation(settings.cache, size.rows, size.tasks)
            answers = partial(peer_generation.answers, decoder, threads=settings.threads)
            for count in counts:
                batch = decoder.batch(count)
                _add(
                    figures, GENERATION, count, _raced(settings, answers, batch, peer_generation.oracle(decoder, batch))
                )
    columns = tuple(f"{_adapters(count)}, {unit}" for unit in ("ratio", "ms") for count in counts)
    rows = tuple(Row(name, {column: own.get(column) for column in columns}) for name, own in figures.items())
    return Table("peers", "Peers on the same work", TEXT, columns, rows, losses(rows))


def _raced(settings: Settings, answers: Answers, batch: Batch, expected: Array) -> dict[str, Mapping[str, Figure]]:
    """Name of a case -> figures; words stand in the first column."""
    with answers(batch) as found:
        cases = {name: answer for name, answer in found.items() if not isinstance(answer, str)}
        for name, answer in cases.items():
            peer_cases.check(name, answer, expected)
        timed = race(cases, settings.seconds, OURS)
        return {name: {"ratio": answer} if isinstance(answer, str) else timed[name] for name, answer in found.items()}


def _add(
    figures: dict[str, dict[str, Figure]], work: str, count: int, found: Mapping[str, Mapping[str, Figure]]
) -> None:
    for case, own in found.items():
        row = figures.setdefault(f"{work}: {case}", {})
        row.update({f"{_adapters(count)}, {unit}": figure for unit, figure in own.items()})


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

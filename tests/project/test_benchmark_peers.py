"""The comparison with other toolkits runs, and notices an answer that is not PEFT's."""

from __future__ import annotations

import pytest

from benchmarks.tables import peer_cases
from benchmarks.tables.peer_cases import OURS, Batch, Difference
from benchmarks.tables.peer_losses import losses
from benchmarks.tables.peer_models import SMALLEST, Work
from benchmarks.tables.table import Row
from tpeft_deploy.runtime.bench.results import Spread


def test_every_toolkit_gives_the_answers_of_peft_and_no_others(tmp_path_factory: pytest.TempPathFactory) -> None:
    work = Work(tmp_path_factory.mktemp("peers"), "conv net", SMALLEST)
    batch = Batch.of(work, 0, 3)
    expected = peer_cases.oracle(work, batch)
    exchanged = peer_cases.oracle(work, Batch(batch.inputs, [*batch.tasks[1:], batch.tasks[0]]))
    with peer_cases.answers(work, batch, 1) as found:
        answers = {name: answer for name, answer in found.items() if not isinstance(answer, str)}
        assert len(answers) == 9
        assert OURS in answers
        for name, answer in answers.items():
            peer_cases.check(name, answer, expected)
            with pytest.raises(Difference, match=name):
                peer_cases.check(name, answer, exchanged)


def test_peers_that_are_ahead_are_losses() -> None:
    ahead, behind = Spread(0.7, 0.8, 0.9), Spread(0.9, 1.1, 1.3)
    rows = [Row("a", {"1 adapter, ratio": ahead}), Row("b", {"1 adapter, ratio": behind, "1 adapter, ms": ahead})]
    assert list(losses(rows)) == ["a"]

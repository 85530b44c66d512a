"""Requests of more rows than a run takes: cut, alternated, joined again."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.runtime.gate import MANIFEST, Gate, entered, rows, run_skipping, skip, waiting
from tests.helpers.runtime.named_batcher import NamedBatcher
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.bundle.manifest import Manifest, Port, Varies
from tpeft_deploy.errors import DeadlineExceeded, QueueFull, RunError, TooLarge
from tpeft_deploy.runtime.batching.collate import Outputs
from tpeft_deploy.runtime.batching.policy import Limits
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.tucker import Array

TASKS = ["partial", "plain", "two", "wide", "base"]
TEXT = Manifest(
    *("net", "test", {}, {}, (), "each", ""),
    inputs=(Port("ids", "int64", ("batch", "length"), pad=0), Port("scale", "float32", ())),
    outputs=(
        Port("doubled", "int64", ("batch", "length"), rows="each"),
        Port("scores", "int64", ("batch", 4), Varies(1, "head.weight"), rows="each"),
        Port("table", "float32", (2,), rows="shared"),
        Port("all", "int64", ("batch", "batch"), rows="joint"),
    ),
    files={},
)


def text(inputs: Mapping[str, Array], tasks: Sequence[str], _options: Any) -> Outputs:
    """Each row doubled, and cut to as many scores as its task's name has letters."""
    ids = inputs["ids"]
    scores = [row[:1].repeat(len(str(task))) for row, task in zip(ids, tasks, strict=True)]
    return {"doubled": 2 * ids, "scores": scores, "table": np.ones(2, np.float32), "all": ids @ ids.T}


def infer(limits: Limits, engine: Any, inputs: Mapping[str, Array], tasks: list[str] | str, **more: Any) -> Any:
    own = NamedBatcher(TEXT, engine, limits)
    try:
        if isinstance(tasks, str):
            return asyncio.run(own.infer(inputs, tasks, **more))
        return asyncio.run(own.infer(inputs, tasks=tasks, **more))
    finally:
        own.close()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 7), st.one_of(st.none(), st.integers(7, 60)), st.booleans()
)
def test_an_answer_in_pieces_is_the_answer_in_one(
    count: int, length: int, max_rows: int, elements: int | None, mixed: bool
) -> None:
    inputs = {"ids": np.arange(count * length).reshape(count, length), "scale": np.float32(3) * np.ones(())}
    tasks: Any = ["a" * (1 + row % 3) for row in range(count)] if mixed else "aaa"
    sizes = []

    def watched(inputs: Mapping[str, Array], tasks: Sequence[str], options: Any) -> Outputs:
        assert inputs["ids"].size == 0 or np.shares_memory(inputs["ids"], given)
        sizes.append(inputs["ids"].shape[0])
        return text(inputs, tasks, options)

    given = inputs["ids"]
    outputs = [TEXT.outputs[0], TEXT.outputs[1], TEXT.outputs[2]]
    limits = Limits(max_rows=max_rows, max_run_elements=elements, max_delay=0)
    answer = infer(limits, watched, inputs, tasks, outputs=outputs)
    wanted = infer(Limits(max_rows=100), text, inputs, tasks, outputs=outputs)
    assert sum(sizes) == count
    assert max(sizes) <= max_rows
    assert elements is None or max(sizes) * length <= elements
    for name in ("doubled", "table"):
        np.testing.assert_array_equal(answer[name], wanted[name], strict=True)
    assert type(answer["scores"]) is type(wanted["scores"])
    assert len(answer["scores"]) == len(wanted["scores"]) == count
    for one, other in zip(answer["scores"], wanted["scores"], strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_rows_that_depend_on_one_another_are_not_cut() -> None:
    inputs: dict[str, Array] = {"ids": np.arange(6).reshape(6, 1), "scale": np.ones((), np.float32)}
    joint: Any = {"outputs": [TEXT.outputs[3]]}
    assert infer(Limits(max_rows=2), text, inputs, "a", **joint)["all"].shape == (6, 6)
    assert infer(Limits(max_rows=2, max_request_rows=100), text, inputs, "a", **joint)["all"].shape == (6, 6)
    with pytest.raises(TooLarge, match=r"of 6 rows and 7 elements: expected at most 4 rows where rows depend"):
        infer(Limits(max_rows=1, max_request_rows=100), text, inputs, "a", **joint)
    with pytest.raises(TooLarge, match="at most 6 elements in all, got 7"):
        infer(Limits(max_run_elements=6), text, inputs, "a", **joint)


def test_bounds_hold_when_nothing_waits() -> None:
    def ask(count: int, length: int, **limits: int) -> Any:
        inputs: dict[str, Array] = {"ids": np.ones((count, length), np.int64), "scale": np.ones((), np.float32)}
        return infer(Limits(max_rows=2, **limits), text, inputs, "a", outputs=TEXT.outputs[:1])

    assert len(ask(5, 1)["doubled"]) == 5  # no bound unless one is set
    assert len(ask(5, 1, max_request_rows=5)["doubled"]) == 5
    with pytest.raises(TooLarge, match="expected at most 4 rows, got what counts as 5"):
        ask(5, 1, max_request_rows=4)
    assert len(ask(1, 10, max_run_elements=10)["doubled"]) == 1
    with pytest.raises(TooLarge, match="expected at most 9 elements a row, got 10"):
        ask(1, 10, max_run_elements=9)
    with pytest.raises(TooLarge, match="expected at most 4 rows, got what counts as 5"):
        ask(4, 6, max_run_elements=10, max_request_rows=4)  # few rows, but long ones


def test_short_and_long_rows_fill_a_run_by_their_elements() -> None:
    gate = Gate(is_open=False)
    own = NamedBatcher(MANIFEST, gate, Limits(max_rows=8, max_run_elements=9, max_delay=0))

    async def main() -> None:
        asked = [asyncio.create_task(own.infer(rows(1), "a"))]
        await entered(gate)
        asked += [asyncio.create_task(own.infer(rows(1), "b")) for _ in range(5)]
        await waiting(own, 5)
        gate.open.set()
        await asyncio.gather(*asked)

    asyncio.run(main())
    own.close()
    assert [len(run) for run in gate.runs] == [1, 3, 2]


def test_times_of_pieces_add_up() -> None:
    now = iter(range(1000))
    own = NamedBatcher(MANIFEST, Gate(), Limits(max_rows=2, max_delay=0), clock=lambda: float(next(now)))
    timing = Timing(0.0)
    asyncio.run(own.infer(rows(5), "a", timing=timing))
    own.close()
    assert timing.rows == 2
    assert timing.ran == 3  # each run takes one tick
    assert timing.queued + timing.ran == timing.ended


def large(gate: Gate, **options: Any) -> NamedBatcher:
    return NamedBatcher(MANIFEST, gate, Limits(max_rows=2, max_delay=0, **options))


def test_cancelling_drops_what_waits_and_stops_what_runs() -> None:
    gate = Gate(is_open=False)
    own = large(gate)

    async def main() -> None:
        task = asyncio.create_task(own.infer(rows(7), "a"))
        await entered(gate)
        await waiting(own, 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert own.figures().waiting_requests == own.figures().waiting_rows == 0
        while not own.figures().stopped:
            await asyncio.sleep(0.001)
        gate.open.set()
        await own.infer(rows(1), "b")

    asyncio.run(main())
    own.close()
    assert gate.runs == [["a", "a"], ["b"]]
    assert (own.figures().cancelled, own.figures().refused) == (1, 0)


def test_a_deadline_ends_all_pieces() -> None:
    gate = Gate(is_open=False)
    own = large(gate)

    async def main() -> None:
        task = asyncio.create_task(own.infer(rows(6), "a", timeout=1000.0))
        await entered(gate)
        await waiting(own, 2)
        skip(1001)
        with pytest.raises(DeadlineExceeded, match="on 6 rows"):
            await task
        assert own.figures().waiting_requests == 0
        gate.open.set()

    run_skipping(main())
    own.close()
    assert len(gate.runs) == 1
    assert own.figures().overdue == 1


def test_an_error_of_one_piece_is_the_answer_and_ends_the_others() -> None:
    gate = Gate()
    own = large(gate)

    async def main() -> None:
        with pytest.raises(ValueError, match="a bad row"):
            await own.infer(rows(8), tasks=["a", "a", "a", "bad", "a", "a", "a", "a"])
        assert own.figures().waiting_requests == 0
        assert len((await own.infer(rows(3), "b"))["y"]) == 3

    asyncio.run(main())
    own.close()
    assert gate.runs[:2] == [["a", "a"], ["a", "bad"]]
    assert sum(map(len, gate.runs)) == 7


def test_closing_fails_a_request_half_way() -> None:
    gate = Gate(is_open=False)
    own = large(gate)

    async def main() -> None:
        task = asyncio.create_task(own.infer(rows(6), "a"))
        await entered(gate)
        await waiting(own, 2)
        closing = asyncio.create_task(asyncio.to_thread(own.close))
        with pytest.raises(RunError, match="closed"):
            await task
        gate.open.set()
        await closing

    asyncio.run(main())
    assert len(gate.runs) == 1


def test_a_piece_of_another_size_is_refused_not_guessed() -> None:
    def shrinking(inputs: Mapping[str, Array], tasks: Sequence[str], options: Any) -> Outputs:
        return {"y": np.zeros((len(inputs["x"]), len(inputs["x"])))}

    own = NamedBatcher(MANIFEST, shrinking, Limits(max_rows=2, max_delay=0))
    with pytest.raises(RunError, match=r"put output 'y' of the runs of a large request together: expected \[1, 2\]"):
        asyncio.run(own.infer(rows(3), "a"))
    own.close()


def test_inputs_and_answers_go_without_a_collection() -> None:
    class Traced(np.ndarray[Any, Any]):
        """An array that can be referred to weakly."""

    gate = Gate()
    own = large(gate, max_queue_rows=6)
    kept: list[weakref.ref[Any]] = []

    async def one(task: str, error: type[Exception] | None) -> None:
        inputs = {"x": np.ones((7 if error is QueueFull else 5, 3), np.float32).view(Traced)}
        kept.append(weakref.ref(inputs["x"]))
        try:
            await own.infer(inputs, task)
        except (ValueError, QueueFull):
            assert error is not None

    async def main() -> None:
        await one("a", None)
        await one("bad", ValueError)
        gate.open.clear()
        gate.entered.clear()
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        second = asyncio.create_task(own.infer(rows(1), "a"))
        await waiting(own, 1)
        await one("a", QueueFull)
        gate.open.set()
        await asyncio.gather(first, second)

    gc.disable()
    try:
        asyncio.run(main())
        own.close()
        assert [reference() is None for reference in kept] == [True] * 3
    finally:
        gc.enable()
    assert own.figures().refused == 1


@pytest.mark.parametrize("mixed", [True, False])
def test_a_model_answers_in_pieces_as_it_does_at_once(conv_bundle: Bundle, mixed: bool) -> None:
    pixels = {"pixels": np.random.default_rng(0).standard_normal((11, 1, 12, 14)).astype(np.float32)}
    with Runtime(conv_bundle.path, provider="cpu", threads=1, limits=Limits(max_rows=3)) as runtime:
        if not mixed:
            one = asyncio.run(runtime.infer(pixels, "wide"))["logits"]
            whole = runtime.run(pixels, "wide")["logits"]
            assert one.dtype == whole.dtype
            np.testing.assert_allclose(one, whole, rtol=1e-4, atol=1e-6)
            return
        tasks = [TASKS[row % 5] for row in range(11)]
        found = asyncio.run(runtime.infer(pixels, tasks=tasks))["logits"]
        wanted = runtime.run(pixels, tasks=tasks)["logits"]
        assert [row.shape for row in found] == [row.shape for row in wanted]
        for own, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
        assert runtime.batching().batches == 4


def test_callers_in_threads_get_their_own_rows() -> None:
    """Large and small requests of several event loops at once."""
    own = NamedBatcher(MANIFEST, Gate(), Limits(max_rows=3, max_delay=0, max_queue_rows=10_000))
    wrong: list[str] = []

    def client(number: int) -> None:
        async def main() -> None:
            for turn in range(12):
                count = 1 + (number + turn) % 8
                answer = await own.infer(rows(count, number), "t" * (1 + turn % 3))
                if not np.array_equal(np.asarray(answer["y"]), np.full((count, 3), number + 1 + turn % 3)):
                    wrong.append(f"{number} {turn}")

        asyncio.run(main())

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own.close()
    assert not wrong

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.helpers.runtime.gate import MANIFEST, Gate, entered, rows, run_skipping, skip, waiting
from tests.helpers.runtime.named_batcher import Counts, NamedBatcher, NamedEngine, version
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import DeadlineExceeded, QueueFull, RunError
from tpeft_deploy.runtime.batching import worker as batchers
from tpeft_deploy.runtime.batching.calls import Answered, Call, InferOptions
from tpeft_deploy.runtime.batching.calls import answer as hand_out
from tpeft_deploy.runtime.batching.collate import Outputs
from tpeft_deploy.runtime.batching.policy import Limits, Request
from tpeft_deploy.tucker import Array


@pytest.fixture
def make() -> Iterator[Callable[..., NamedBatcher]]:
    made: list[NamedBatcher] = []

    def build(engine: NamedEngine, manifest: Manifest = MANIFEST, **limits: Any) -> NamedBatcher:
        made.append(NamedBatcher(manifest, engine, Limits(**limits)))
        return made[-1]

    yield build
    for own in made:
        own.close()


def test_what_comes_during_a_run_is_joined_and_everyone_gets_the_own_answer(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)

    async def main() -> list[Answered]:
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        others = [asyncio.create_task(own.infer(rows(n, n), "b" * n)) for n in (1, 2, 3)]
        await waiting(own, 3)
        gate.open.set()
        return await asyncio.gather(first, *others)

    answers = asyncio.run(main())
    assert gate.runs == [["a"], ["b", "bb", "bb", "bbb", "bbb", "bbb"]]
    for answer, expected in zip(answers, [(1, 2), (1, 2), (2, 4), (3, 6)], strict=True):
        np.testing.assert_array_equal(answer["y"], np.full((expected[0], 3), expected[1], np.float32))
    figures = own.figures()
    assert (figures.batches, figures.rows, figures.joined) == (2, 7, {1: 1, 3: 1})
    assert (figures.waiting_requests, figures.waiting_rows, figures.cancelled) == (0, 0, 0)


def test_a_single_client_never_waits_for_company_that_does_not_come(make: Callable[..., NamedBatcher]) -> None:
    own = make(Gate(), max_delay=10_000.0)  # for ever, if one request waited

    async def main() -> None:
        for _ in range(50):
            await own.infer(rows(1), "a")

    asyncio.run(main())
    assert own.figures().joined == {1: 50}


def test_only_the_bad_requests_of_a_batch_fail(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(own.infer(rows(1), "a"))]
        await entered(gate)
        tasks += [asyncio.create_task(own.infer(rows(1), task)) for task in ("bad", "ok", "bad", "fine")]
        await waiting(own, 4)
        gate.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(main())
    assert [type(answer).__name__ for answer in answers] == ["dict", "ValueError", "dict", "ValueError", "dict"]
    assert answers[1] is not answers[3]
    np.testing.assert_array_equal(answers[4]["y"], np.full((1, 3), 5, np.float32))
    assert gate.runs[1:] == [["bad", "ok", "bad", "fine"], ["bad"], ["ok"], ["bad"], ["fine"]]


def test_a_request_cancelled_in_the_queue_never_runs(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)

    async def main() -> None:
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        gone, stays = (asyncio.create_task(own.infer(rows(1), task)) for task in ("gone", "stays"))
        await waiting(own, 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert own.figures().waiting_rows == 1
        gate.open.set()
        await asyncio.gather(first, stays)

    asyncio.run(main())
    assert gate.runs == [["a"], ["stays"]]
    assert own.figures().cancelled == 1


def test_a_run_is_stopped_once_nobody_waits_for_it(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)

    async def main() -> None:
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        pair = [asyncio.create_task(own.infer(rows(1), "b", timeout=time)) for time in (None, 1000.0)]
        await waiting(own, 2)
        first.cancel()
        await entered(gate)  # the run of the first has ended, though the gate is shut
        pair[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await pair[0]
        assert own.figures().stopped == 1  # the other still waits
        skip(1000.0)
        with pytest.raises(DeadlineExceeded):
            await pair[1]
        while own.figures().stopped != 2:
            await asyncio.sleep(0.001)
        gate.open.set()
        await own.infer(rows(1), "c")

    run_skipping(main())
    assert gate.runs == [["a"], ["b", "b"], ["c"]]
    assert (own.figures().cancelled, own.figures().overdue) == (2, 1)


def test_a_request_overdue_in_the_queue_never_runs(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)

    async def main() -> None:
        with pytest.raises(DeadlineExceeded, match=r"run task 'late' on 1 rows: expected an answer within 0 s"):
            await own.infer(rows(1), "late", timeout=0)
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        with pytest.raises(DeadlineExceeded, match=r"'queued'.* within 0\.05 s, got none by then\. Allow more time"):
            await own.infer(rows(1), "queued", timeout=0.05)
        with pytest.raises(DeadlineExceeded):
            await asyncio.create_task(own.infer(rows(1), "again", timeout=0.01))
        gate.open.set()
        await first
        await own.infer(rows(1), "in time", timeout=60)

    asyncio.run(main())
    assert gate.runs == [["a"], ["in time"]]
    assert own.figures().overdue == 3


def test_the_others_of_a_run_get_their_answers_after_one_is_overdue(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)

    async def main() -> None:
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        stays, late = (asyncio.create_task(own.infer(rows(1), "b", timeout=time)) for time in (None, 1000.0))
        await waiting(own, 2)
        first.cancel()
        await entered(gate)
        skip(1000.0)
        with pytest.raises(DeadlineExceeded):
            await late
        assert not stays.done()
        gate.open.set()
        np.testing.assert_array_equal((await stays)["y"], np.full((1, 3), 2, np.float32))

    run_skipping(main())
    assert gate.runs == [["a"], ["b", "b"]]


def test_a_full_queue_and_a_closed_batcher_refuse(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate, max_queue_rows=2)

    async def main() -> None:
        first = asyncio.create_task(own.infer(rows(1), "a"))
        await entered(gate)
        waits = asyncio.create_task(own.infer(rows(2), "b"))
        await waiting(own, 1)
        with pytest.raises(QueueFull, match="at most 2 rows waiting, got 2 rows in 1 requests"):
            await own.infer(rows(1), "c")
        closing = asyncio.create_task(asyncio.to_thread(own.close))
        with pytest.raises(RunError, match=r"run task 'b' on bundle 'net': the runtime is closed"):
            await waits
        with pytest.raises(RunError, match="closed"):
            await own.infer(rows(1), "d")
        assert not first.done()
        gate.open.set()
        await asyncio.gather(first, closing)  # what runs is still answered
        await asyncio.to_thread(own.close)

    asyncio.run(main())
    assert own.figures().refused == 1
    assert not own._workers


def test_a_loop_that_was_closed_early_harms_nobody(make: Callable[..., NamedBatcher]) -> None:
    gate = Gate(is_open=False)
    own = make(gate)
    loop = asyncio.new_event_loop()
    task = loop.create_task(own.infer(rows(1), "a"))
    loop.run_until_complete(entered(gate))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open.set()
    asyncio.run(own.infer(rows(1), "b"))
    assert gate.runs == [["a"], ["b"]]
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # this loop was closed so on purpose
    task.get_coro().close()


def test_nothing_is_kept_of_requests_that_are_done(make: Callable[..., NamedBatcher]) -> None:
    class Traced(np.ndarray[Any, Any]):
        """An array that can be referred to weakly."""

    gate = Gate()
    own = make(gate)
    kept: list[weakref.ref[Array]] = []

    async def one(task: str, timeout: float | None) -> None:
        inputs = {"x": np.ones((1, 3), np.float32).view(Traced)}
        kept.append(weakref.ref(inputs["x"]))
        await own.infer(inputs, task, timeout=timeout)

    async def main() -> None:
        await asyncio.gather(
            *(one(task, timeout) for task in ("a", "bad") for timeout in (None, 5000.0)), return_exceptions=True
        )
        gate.open.clear()
        gate.entered.clear()
        lost = [asyncio.create_task(one("lost", timeout)) for timeout in (None, 5000.0, 0.05)]
        await entered(gate)
        for task in lost:
            task.cancel()
        await asyncio.gather(*lost, return_exceptions=True)
        gate.open.set()
        await own.infer(rows(1), "a")

    asyncio.run(main())
    gc.collect()
    assert len(kept) == 7
    assert [ref for ref in kept if ref() is not None] == []


def test_an_idle_worker_ends_and_comes_back_and_keeps_no_batcher_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchers, "_IDLE_SECONDS", 0.05)
    workers: list[threading.Thread] = []

    def engine(inputs: Mapping[str, Array], tasks: Sequence[str], options: Any) -> Outputs:
        workers.append(threading.current_thread())
        return {"y": inputs["x"]}

    own = NamedBatcher(MANIFEST, engine, Limits())
    for _ in range(2):
        asyncio.run(own.infer(rows(1), "a"))
        workers[-1].join(100)
        assert not workers[-1].is_alive()
    assert workers[0] is not workers[1]
    left = weakref.ref(own)
    del own
    gc.collect()
    assert left() is None


def bundle_engine(runtime: Runtime, runs: list[int]) -> NamedEngine:
    def engine(inputs: Mapping[str, Array], tasks: Sequence[str], options: onnxruntime.RunOptions) -> Outputs:
        runs.append(len(tasks))
        return runtime.run(inputs, tasks=[str(task) for task in tasks])

    return engine


def test_eight_event_loops_get_what_run_gives_them(conv_bundle: Bundle, make: Callable[..., NamedBatcher]) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    runs: list[int] = []
    own = make(bundle_engine(runtime, runs), conv_bundle.manifest, max_rows=16)
    random = np.random.default_rng(0)
    samples = [
        ({"pixels": random.standard_normal((1 + n % 3, 1, 12, 14)).astype(np.float32)}, task)
        for n, task in enumerate(["base", "two", "wide", "plain", "partial"] * 2)
    ]
    expected = [runtime.run(inputs, task)["logits"] for inputs, task in samples]
    checked: list[int] = []
    faults: list[BaseException] = []

    async def client(offset: int) -> None:
        for place in range(25):
            chosen = (offset + place) % len(samples)
            answer = await own.infer(*samples[chosen], timeout=200.0)
            assert list(answer) == ["logits"]
            np.testing.assert_allclose(answer["logits"], expected[chosen], rtol=1e-4, atol=1e-5)
            checked.append(chosen)

    async def clients(offset: int) -> None:
        await asyncio.gather(*(client(offset + more) for more in range(8)))

    def thread(offset: int) -> None:
        try:
            asyncio.run(clients(offset))
        except BaseException as fault:
            faults.append(fault)
            raise

    threads = [threading.Thread(target=thread, args=(offset,)) for offset in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert faults == []
    assert len(checked) == 1600
    figures = own.figures()
    assert figures.batches == len(runs) < 800  # joined, not one by one
    assert figures.rows == sum(runs) == sum(len(samples[chosen][0]["pixels"]) for chosen in checked)
    assert max(runs) <= 16
    assert sum(count * batches for count, batches in figures.joined.items()) == 1600


def looping(times: int) -> onnxruntime.InferenceSession:
    """A session that multiplies x by the unit matrix so many times."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("MatMul", ["z", "unit"], ["z_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("z_out", TensorProto.FLOAT, None),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "yes", "x"], ["y"], body=body)],
        "looping",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("unit", TensorProto.FLOAT, [3, 3], np.eye(3).ravel()),
            helper.make_tensor("times", TensorProto.INT64, [], [times]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def session_engine(session: onnxruntime.InferenceSession, began: threading.Event, ended: list[str]) -> NamedEngine:
    def engine(inputs: Mapping[str, Array], tasks: Sequence[str], options: onnxruntime.RunOptions) -> Outputs:
        began.set()
        try:
            outputs = session.run(None, dict(inputs), options)
        except Exception as error:
            ended.append(str(error))
            raise
        ended.append("done")
        return {"y": outputs[0]}

    return engine


@pytest.mark.parametrize("how", ["cancelled", "overdue"])
def test_a_real_run_ends_early(make: Callable[..., NamedBatcher], how: str) -> None:
    began, ended = threading.Event(), list[str]()
    own = make(session_engine(looping(1 << 62), began, ended))  # longer than anybody lives

    async def main() -> None:
        task = asyncio.create_task(own.infer(rows(2), "a", timeout=1000.0 if how == "overdue" else None))
        assert await asyncio.to_thread(began.wait, 100)
        if how == "cancelled":
            task.cancel()
        else:
            skip(1000.0)
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else DeadlineExceeded):
            await task
        await asyncio.to_thread(wait_until, lambda: ended)

    run_skipping(main())
    assert "terminate" in ended[0]
    assert own.figures().stopped == 1


def test_a_caller_that_leaves_before_it_hears_takes_no_answer_from_others() -> None:
    """Answers of a run are delivered together, after the worker has sent them off."""

    async def main() -> None:
        loop, held = asyncio.get_running_loop(), Counts().acquire([version("base")])
        leaves, stays = (
            Call(Request(number, 1, None), {}, held, held.versions, InferOptions(()), loop.create_future())
            for number in range(2)
        )
        future = stays.future
        hand_out([(leaves, {"out": np.zeros(1)}), (stays, {"out": np.ones(1)})])
        leaves.release()
        assert (await asyncio.wait_for(future, 100))["out"] == [1]

    asyncio.run(main())

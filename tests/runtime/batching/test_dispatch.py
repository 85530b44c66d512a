"""`await runtime.infer(...)`: what `run` answers, in batches with others."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.helpers.waiting import wait_until
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import (
    CapacityError,
    CompositionError,
    DeadlineExceeded,
    InputError,
    QueueFull,
    RunError,
    UnknownTask,
)
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.engine import Engine

ALL = ["partial", "plain", "two", "wide", "base"]


def images(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


def close(answer: object, wanted: object) -> None:
    np.testing.assert_allclose(np.asarray(answer), np.asarray(wanted), rtol=1e-4, atol=1e-6)


def open_runtime(bundle: Bundle, **options: Any) -> Runtime:
    return Runtime(bundle.path, provider="cpu", threads=1, **options)


def test_requests_of_all_tasks_are_joined_and_answered_as_run_answers(conv_bundle: Bundle) -> None:
    with open_runtime(conv_bundle, limits=Limits(max_delay=0.05)) as runtime:
        asked = [(ALL[n % 5], images(1 + n % 3, n)) for n in range(40)]
        wanted = [runtime.run(inputs, task)["logits"] for task, inputs in asked]

        async def ask() -> list[dict[str, np.ndarray]]:
            return await asyncio.gather(*(runtime.infer(inputs, task) for task, inputs in asked))

        for answer, own in zip(asyncio.run(ask()), wanted, strict=True):
            close(answer["logits"], own)
        assert max(runtime.batching().joined) > 1


def test_weighted_sets_are_answered_too(conv_bundle: Bundle) -> None:
    with open_runtime(conv_bundle) as runtime:
        task = {"plain": 0.5}
        close(asyncio.run(runtime.infer(images(2), task))["logits"], runtime.run(images(2), task)["logits"])


@pytest.mark.parametrize(
    ("inputs", "task", "error"),
    [
        (images(1), "other", UnknownTask),
        ({"pixels": np.zeros((1, 2), np.float32)}, "two", InputError),
        (images(1), {"two": 0.5}, CompositionError),
        (images(1), {"two": float("nan")}, CompositionError),
        (images(1), {}, CompositionError),
    ],
)
def test_one_bad_request_fails_alone(
    conv_bundle: Bundle, inputs: dict[str, np.ndarray], task: Any, error: type[Exception]
) -> None:
    with open_runtime(conv_bundle, limits=Limits(max_delay=0.05)) as runtime:

        async def ask() -> list[Any]:
            good = [runtime.infer(images(1, seed), "wide") for seed in range(5)]
            return await asyncio.gather(*good, runtime.infer(inputs, task), return_exceptions=True)

        *answers, bad = asyncio.run(ask())
        assert isinstance(bad, error)
        for seed, answer in enumerate(answers):
            close(answer["logits"], runtime.run(images(1, seed), "wide")["logits"])


def test_a_damaged_task_fails_alone(own_bundle: Bundle) -> None:
    runtime = open_runtime(own_bundle, preload=False)
    next((own_bundle.path / "adapters" / "two").rglob("adapter.safetensors")).write_bytes(b"x")

    async def ask() -> list[Any]:
        tasks = ["wide", "two", "plain"]
        return await asyncio.gather(*(runtime.infer(images(1), task) for task in tasks), return_exceptions=True)

    wide, bad, plain = asyncio.run(ask())
    assert "task 'two'" in str(bad)
    assert wide["logits"].shape == (1, 17)
    assert plain["logits"].shape == (1, 10)
    runtime.close()


def test_a_request_that_is_accepted_is_answered_by_the_version_of_that_moment(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    with open_runtime(conv_bundle, limits=Limits(max_delay=0.2)) as runtime:

        async def ask() -> tuple[Any, Any]:
            # Two, so that the second waits for others to join while the task is replaced, then unloaded.
            first = asyncio.create_task(runtime.infer(images(1), "two"))
            second = asyncio.create_task(runtime.infer(images(1), "two"))
            await asyncio.sleep(0)
            await asyncio.to_thread(runtime.load, "two", conv_adapters["wide"])
            await asyncio.to_thread(runtime.unload, "two")
            return await first, await second

        for answer in asyncio.run(ask()):
            assert answer["logits"].shape == (1, 2)
        assert runtime._residency.usage()["rows_taken"] == 3


def test_a_cold_task_does_not_hold_up_the_event_loop(conv_bundle: Bundle) -> None:
    with open_runtime(conv_bundle, preload=False) as runtime:
        version = runtime._versions.find("wide")
        read, entered, go_on = version.read, threading.Event(), threading.Event()

        def slowly() -> Adapter:
            entered.set()
            assert go_on.wait(100)
            return read()

        version.read = slowly

        async def ask() -> Any:
            cold = asyncio.create_task(runtime.infer(images(1), "wide"))
            while not entered.is_set():
                await asyncio.sleep(0.001)
            for _ in range(3):
                await runtime.infer(images(1), "base")
            assert not cold.done()
            go_on.set()
            return await cold

        assert asyncio.run(ask())["logits"].shape == (1, 17)


def test_time_that_is_over_while_a_task_is_read_gives_its_row_back(conv_bundle: Bundle) -> None:
    with open_runtime(conv_bundle, preload=False) as runtime:
        version = runtime._versions.find("wide")
        read, go_on = version.read, threading.Event()

        def slowly() -> Adapter:
            assert go_on.wait(100)
            return read()

        version.read = slowly

        async def ask() -> None:
            with pytest.raises(DeadlineExceeded, match="still being read"):
                await runtime.infer(images(1), "wide", timeout=0.05)
            cancelled = asyncio.create_task(runtime.infer(images(1), "wide"))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            go_on.set()

        asyncio.run(ask())
        wait_until(lambda: version.users == 0)
        assert runtime.run(images(1), "wide")["logits"].shape == (1, 17)


def test_the_queue_is_bounded(conv_bundle: Bundle) -> None:
    with open_runtime(conv_bundle, limits=Limits(max_rows=4, max_queue_rows=8, max_delay=0.2)) as runtime:

        async def ask() -> list[Any]:
            return await asyncio.gather(*(runtime.infer(images(1), "two") for _ in range(60)), return_exceptions=True)

        answers = asyncio.run(ask())
        refused = [answer for answer in answers if isinstance(answer, QueueFull)]
        assert refused
        assert len(refused) < 60
        assert all(isinstance(answer, dict | QueueFull) for answer in answers)


def test_no_room_is_said_to_the_one_who_asked(conv_bundle: Bundle) -> None:
    size = open_runtime(conv_bundle)._residency._bank.row_bytes
    with open_runtime(conv_bundle, device_bytes=2 * size, preload=False) as runtime:
        runtime.pin("two")

        async def ask() -> Any:
            return await asyncio.gather(
                runtime.infer(images(1), "two"), runtime.infer(images(1), "wide"), return_exceptions=True
            )

        good, bad = asyncio.run(ask())
        assert good["logits"].shape == (1, 2)
        assert isinstance(bad, CapacityError)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_version_whose_callers_left_is_held_until_its_run_ends(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """One count per request: it outlives a caller that is cancelled during the run, and ends with the run."""
    began, go_on = threading.Event(), threading.Event()
    real, seen = Engine.run_held, list[int]()

    def waiting(
        self: Engine, inputs: dict[str, np.ndarray], versions: list[Version], options: onnxruntime.RunOptions
    ) -> Any:
        began.set()
        assert go_on.wait(100)
        seen.append(versions[0].users)
        return real(self, inputs, versions, options)

    monkeypatch.setattr(Engine, "run_held", waiting)
    limits = Limits(max_rows=2, max_request_rows=10)
    with open_runtime(conv_bundle, limits=limits) as runtime:
        version = runtime._versions.find("two")

        async def ask() -> None:
            gone = asyncio.create_task(runtime.infer(images(rows), "two"))
            assert await asyncio.to_thread(began.wait, 100)
            assert version.users == 1
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            runtime.unload("two")
            assert (version.users, version.current) == (1, False)
            go_on.set()

        asyncio.run(ask())
        wait_until(lambda: version.users == 0)
        assert version.row is None
    assert seen == [1]


def test_a_closed_runtime_says_so(conv_bundle: Bundle) -> None:
    runtime = open_runtime(conv_bundle)
    runtime.close()
    with pytest.raises(RunError, match="closed"):
        asyncio.run(runtime.infer(images(1), "base"))


class TestRaggedText:
    """Sentences of different lengths share a run where the manifest says what fills them up."""

    @pytest.fixture(scope="class")
    @staticmethod
    def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
        from transformers import BertConfig, BertForSequenceClassification

        from tpeft_deploy import TuckerDelta, export_bundle

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).eval()
        place = tmp_path_factory.mktemp("text")
        model.save_pretrained(place / "model")
        rng = np.random.default_rng(0)
        name = "bert.encoder.layer.0.attention.self.query.weight"
        deltas = {
            task: Adapter(
                {
                    name: TuckerDelta(
                        rng.standard_normal((4, 4)).astype("f4"),
                        (rng.standard_normal((32, 4)).astype("f4"), rng.standard_normal((32, 4)).astype("f4")),
                        scale=0.2,
                    )
                }
            )
            for task in ("a", "b")
        }
        bundle: Bundle = export_bundle(str(place / "model"), deltas, place / "bundle")
        return bundle

    def test_rows_of_all_lengths_are_answered_as_alone(self, bundle: Bundle) -> None:
        assert bundle.manifest.paddable
        rng = np.random.default_rng(1)
        asked = []
        for number in range(24):
            length = int(rng.integers(3, 12))
            ids = {"input_ids": rng.integers(1, 60, (1 + number % 2, length))}
            ids["attention_mask"] = np.ones_like(ids["input_ids"])
            if "token_type_ids" in {port.name for port in bundle.manifest.inputs}:
                ids["token_type_ids"] = np.zeros_like(ids["input_ids"])
            asked.append((["a", "b", "base"][number % 3], ids))
        with open_runtime(bundle, limits=Limits(max_delay=0.1)) as runtime:
            wanted = [runtime.run(ids, task) for task, ids in asked]

            async def ask() -> list[dict[str, np.ndarray]]:
                return await asyncio.gather(*(runtime.infer(ids, task) for task, ids in asked))

            answers = asyncio.run(ask())
            figures = runtime.batching()
        assert figures.batches < 12
        for answer, own in zip(answers, wanted, strict=True):
            for name, array in own.items():
                assert answer[name].shape == array.shape
                close(answer[name], array)

"""Serving on two devices, which on the CPU are two banks and two sets of sessions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.helpers.waiting import wait_until
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import AdapterError, CapacityError, InputError, UnknownTask
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.devices.spread import SpreadResidency

ALL = ["partial", "plain", "two", "wide"]
DEVICES = [0, 1]


def images(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


def close(answer: object, wanted: object) -> None:
    np.testing.assert_allclose(np.asarray(answer), np.asarray(wanted), rtol=1e-4, atol=1e-6)


def open_runtime(bundle: Bundle, **options: Any) -> Runtime:
    return Runtime(bundle.path, provider="cpu", threads=1, devices=DEVICES, **options)


@pytest.fixture(scope="module")
def expected(conv_bundle: Bundle) -> dict[str, np.ndarray]:
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
        return {task: runtime.run(images(3), task)["logits"] for task in [*ALL, "base"]}


@pytest.fixture
def runtime(conv_bundle: Bundle) -> Iterator[Runtime]:
    with open_runtime(conv_bundle) as own:
        yield own


def spread(runtime: Runtime) -> SpreadResidency:
    assert isinstance(runtime._placed, SpreadResidency)
    return runtime._placed


def where(runtime: Runtime, task: str) -> list[int]:
    """The devices that have a task's adapter."""
    version = runtime._versions.find(task)
    return [place for place in DEVICES if version.on(place).row is not None]


def heat(runtime: Runtime, task: str) -> None:
    """Ask for a task as often as makes it hot."""
    own = spread(runtime)
    now = own._clock()
    own._clock = lambda: now
    for _ in range(100):
        own.choose([runtime._versions.find(task)])
    own._clock = lambda: now + 2
    own.choose([runtime._versions.find(task)])


def test_answers_are_those_of_one_device(runtime: Runtime, expected: dict[str, np.ndarray]) -> None:
    assert sorted(len(where(runtime, task)) for task in ALL) == [1, 1, 1, 1]
    for task, wanted in expected.items():
        close(runtime.run(images(3), task)["logits"], wanted)
    mixed = runtime.run(images(3), tasks=["two", "base", "wide"])["logits"]
    for row, task in enumerate(["two", "base", "wide"]):
        close(mixed[row], expected[task][row])
    close(runtime.run(images(3), {"plain": 1.0})["logits"], expected["plain"])


def test_requests_of_all_tasks_are_answered_by_two_workers(runtime: Runtime, expected: dict[str, np.ndarray]) -> None:
    async def ask() -> list[Any]:
        asked = [runtime.infer(images(3), task) for task in [*expected, *expected]]
        return await asyncio.gather(*asked, runtime.infer(images(3), tasks=["two", "plain", "wide"]))

    *answers, mixed = asyncio.run(ask())
    for task, answer in zip([*expected, *expected], answers, strict=True):
        close(answer["logits"], expected[task])
    for row, task in enumerate(["two", "plain", "wide"]):
        close(mixed["logits"][row], expected[task][row])
    assert not any(own.users for residency in runtime._devices for own in residency._resident)


def test_two_batches_of_one_queue_run_at_once(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    with open_runtime(conv_bundle, limits=Limits(max_rows=1)) as runtime:
        batcher, both = runtime._part(None).batcher, threading.Barrier(2)
        rows = []

        def gated(run: Any, place: int, *batch: Any) -> Any:
            rows.append(place)
            if len(rows) <= 2:
                both.wait(100)  # never over if one worker waits for the other's run
            return run(*batch)

        batcher._run_batch = partial(gated, batcher._run_batch, 0)
        batcher._more = [partial(gated, batcher._more[0], 1)]
        # One request of three rows, which is cut into runs of one.
        close(asyncio.run(runtime.infer(images(3)))["logits"], expected["base"])
        assert sorted(rows[:2]) == DEVICES


def test_a_hot_task_comes_to_a_second_device_and_a_cold_one_stays(
    runtime: Runtime, expected: dict[str, np.ndarray]
) -> None:
    (cold,) = where(runtime, "plain")
    heat(runtime, "two")
    wait_until(lambda: where(runtime, "two") == DEVICES)
    assert where(runtime, "plain") == [cold]
    version = runtime._versions.find("two")
    assert {spread(runtime).choose([version]) for _ in DEVICES} == set(DEVICES)
    for replica in runtime._part(None).replicas:
        close(replica.engine.run_one(images(3), replica.own([version])[0])["logits"], expected["two"])
    held = spread(runtime).try_acquire([version])
    assert held is not None
    assert list(held.places) == DEVICES
    held.release()


def test_unloading_leaves_nothing_on_any_device(runtime: Runtime, expected: dict[str, np.ndarray]) -> None:
    heat(runtime, "two")
    wait_until(lambda: where(runtime, "two") == DEVICES)
    runtime.unload("two")
    assert runtime.usage()["rows_taken"] == 3
    with pytest.raises(UnknownTask):
        runtime.run(images(3), "two")
    runtime.load("two")
    assert len(where(runtime, "two")) == 1
    close(runtime.run(images(3), "two")["logits"], expected["two"])
    assert runtime.usage(0)["rows_taken"] + runtime.usage(1)["rows_taken"] == runtime.usage()["rows_taken"] == 4


def test_eviction_on_one_device_leaves_the_other(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    with Runtime(conv_bundle.path, provider="cpu") as whole:
        size = whole._devices[0]._bank.row_bytes
    with open_runtime(conv_bundle, device_bytes=2 * size, preload=False) as runtime:  # one adapter on each
        runtime.run(images(3), "two")
        heat(runtime, "two")
        wait_until(lambda: where(runtime, "two") == DEVICES)
        runtime._devices[1].acquire([runtime._versions.find("wide").on(1)]).release()
        assert where(runtime, "two") == [0]
        assert where(runtime, "wide") == [1]
        assert runtime.residency(["two", "wide"]) == {"two": "device", "wide": "device"}
        close(runtime.run(images(3), "two")["logits"], expected["two"])
        # More tasks than a device has room for are run one part after the other.
        mixed = asyncio.run(runtime.infer(images(3), tasks=["two", "plain", "wide"]))["logits"]
        for row, task in enumerate(["two", "plain", "wide"]):
            close(mixed[row], expected[task][row])


def test_pins_and_replacements_act_on_all_devices(
    runtime: Runtime, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    runtime.pin("two", folded=True)
    assert where(runtime, "two") == DEVICES
    assert runtime.residency(["two"]) == {"two": "folded"}
    old = runtime._versions.find("two")
    runtime.load("two", conv_adapters["plain"])
    assert where(runtime, "two") == DEVICES
    assert [own.row for _, own in old.everywhere()] == [None, None]
    for replica in runtime._part(None).replicas:
        (own,) = replica.own([runtime._versions.find("two")])
        assert own.pinned
        assert replica.folds.has(own)
        close(replica.engine.run_one(images(3), own)["logits"], expected["plain"])
    runtime.unpin("two")
    assert not any(own.pinned for _, own in runtime._versions.find("two").everywhere())
    assert runtime.residency(["two"]) == {"two": "device"}
    assert runtime.probe("two")


def test_a_pin_that_one_device_refuses_is_on_none(conv_bundle: Bundle) -> None:
    with Runtime(conv_bundle.path, provider="cpu") as whole:
        size = whole._devices[0]._bank.row_bytes
    with open_runtime(conv_bundle, device_bytes=2 * size, preload=False) as runtime:
        runtime.pin("two")
        with pytest.raises(CapacityError):
            runtime.pin("wide")
        assert runtime.pins() == {"two": False}
        assert where(runtime, "wide") == []


def test_loading_and_unloading_while_requests_run(
    runtime: Runtime, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    spread(runtime)._placement._minimum = 0.0  # whatever is asked for much is hot
    over = threading.Event()

    def change() -> None:
        for count in range(30):
            runtime.load("new", conv_adapters["plain" if count % 2 else "two"])
            if count % 5 == 4:
                runtime.unload("new")
        over.set()

    async def ask() -> int:
        thread = threading.Thread(target=change, daemon=True)
        thread.start()
        answered = 0
        while not over.is_set() or answered < 20:
            tasks = ["two", "wide", "new"]
            found = await asyncio.gather(*(runtime.infer(images(3), task) for task in tasks), return_exceptions=True)
            for task, answer in zip(tasks, found, strict=True):
                if task == "new" and isinstance(answer, UnknownTask):
                    continue
                assert not isinstance(answer, BaseException), answer
                wanted = [expected[task]] if task != "new" else [expected["plain"], expected["two"]]
                logits = answer["logits"]
                assert any(
                    own.shape == logits.shape and np.allclose(own, logits, rtol=1e-3, atol=1e-5) for own in wanted
                )
                answered += 1
        thread.join()
        return answered

    assert asyncio.run(ask()) >= 20
    runtime.unload("two")
    runtime.unload("wide")

    def residents() -> set[str]:
        return {own.name for residency in runtime._devices for own in list(residency._resident)}

    wait_until(lambda: residents() == {"partial", "plain"})  # a copy may be under way


def test_a_task_that_cannot_be_copied_stays_where_it_is(
    runtime: Runtime, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home,) = where(runtime, "two")
    tried = threading.Event()

    def refused(*_: object, **__: object) -> None:
        tried.set()
        raise AdapterError("bring 'two' to the device", problem="it cannot be read")

    monkeypatch.setattr(runtime._devices[1 - home], "acquire", refused)
    heat(runtime, "two")
    assert tried.wait(100)
    for _ in range(4):
        close(runtime.run(images(3), "two")["logits"], expected["two"])
    assert where(runtime, "two") == [home]


def test_a_device_that_there_is_not_has_no_usage(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="an index below 2"):
        runtime.usage(2)


def test_components_share_the_devices(towers_bundle: Bundle) -> None:
    with Runtime(towers_bundle.path, provider="cpu") as one, open_runtime(towers_bundle, preload=False) as two:
        for component in one.components:
            example = one._components[component].bundle.example()
            for task in [*one.tasks, "base"]:
                for name, wanted in one.run(example, task, component=component).items():
                    close(two.run(example, task, component=component)[name], wanted)
        changed = {task: one.probe(task) for task in one.tasks}
        assert {task: two.probe(task) for task in two.tasks} == changed

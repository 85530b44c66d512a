"""Adapters come and go under byte budgets; whoever is in use stays, and answers never change."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.waiting import wait_until
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import CapacityError, IntegrityError, RunError, UnknownTask

ALL = ["partial", "plain", "two", "wide"]


def images(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


def row_bytes(bundle: Bundle) -> int:
    """Of a bank that holds every task of the bundle."""
    with Runtime(bundle.path, provider="cpu") as runtime:
        return runtime._residency._bank.row_bytes


def budgeted(bundle: Bundle, adapters: int, *, host_bytes: int = 0, preload: bool = False) -> Runtime:
    """A runtime whose device takes that many adapters beside the base."""
    size = (adapters + 1) * row_bytes(bundle)
    return Runtime(bundle.path, provider="cpu", threads=1, device_bytes=size, host_bytes=host_bytes, preload=preload)


@pytest.fixture(scope="module")
def expected(conv_bundle: Bundle) -> dict[str, np.ndarray]:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    return {task: runtime.run(images(5), task)["logits"] for task in [*ALL, "base"]}


def close(answer: object, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(answer), wanted, rtol=1e-4, atol=1e-6)


def test_tasks_are_brought_when_they_are_asked_for(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    runtime = budgeted(conv_bundle, 4)
    assert runtime.tasks == ALL
    assert set(runtime.residency().values()) == {"disk"}
    close(runtime.run(images(5), "two")["logits"], expected["two"])
    assert runtime.residency() == {"partial": "disk", "plain": "disk", "two": "device", "wide": "disk"}


def test_usage_tells_adapters_from_what_is_reserved(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    runtime = budgeted(conv_bundle, 4)
    assert runtime.usage()["device_adapter_bytes"] == 0
    close(runtime.run(images(5), "two")["logits"], expected["two"])
    used, filled = runtime.usage(), conv_bundle.fill(conv_adapters["two"])
    assert used["device_adapter_bytes"] == sum(a.nbytes for own in filled.values() for a in own.values())
    assert used["device_adapter_bytes"] + used["device_reserved_bytes"] == used["device_bytes"]
    close(runtime.run(images(5), "wide")["logits"], expected["wide"])
    assert runtime.usage()["device_adapter_bytes"] > used["device_adapter_bytes"]


def test_the_least_recently_used_gives_way(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    runtime = budgeted(conv_bundle, 2)
    for task in ("two", "plain", "two", "wide"):
        close(runtime.run(images(5), task)["logits"], expected[task])
    assert runtime.residency() == {"partial": "disk", "plain": "disk", "two": "device", "wide": "device"}
    assert runtime.usage()["device_bytes"] <= 3 * row_bytes(conv_bundle)


def test_what_is_asked_for_without_a_pause_gives_way_too(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    """Nobody begins to use it while another waits for its row; who uses it already may, or its row is never free."""
    runtime = budgeted(conv_bundle, 2)
    residency = runtime._residency
    two, plain = (runtime._versions.find(task) for task in ("two", "plain"))
    held = [residency.acquire([version]) for version in (two, plain, plain)]
    waiting = threading.Thread(target=lambda: close(runtime.run(images(5), "wide")["logits"], expected["wide"]))
    waiting.start()
    wait_until(lambda: residency._leaving is two)  # the one with fewer users
    assert residency.try_acquire([two], new=True) is None
    assert residency.try_acquire([plain, two], new=True) is None
    held += [found for found in (residency.try_acquire([plain], new=True), residency.try_acquire([two])) if found]
    for own in (held[0], held.pop()):
        own.release()
    waiting.join(100)
    assert not waiting.is_alive()
    assert runtime.residency() == {"partial": "disk", "plain": "device", "two": "disk", "wide": "device"}
    for own in held:
        own.release()  # the first for the second time, which changes nothing
    assert not plain.users
    close(runtime.run(images(5), "two")["logits"], expected["two"])


def test_no_row_is_waited_for_that_a_sequence_is_generated_on(
    conv_bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    runtime = budgeted(conv_bundle, 2)
    residency = runtime._residency
    two, plain, wide = (runtime._versions.find(task) for task in ("two", "plain", "wide"))
    generated, run = residency.acquire([two]), residency.acquire([plain, plain])
    again = residency.acquire([plain])
    residency.occupy(two, 1)
    waiting = runtime.prefetch(["wide"])
    wait_until(lambda: residency._leaving is plain)  # though it has more users
    for held in (run, again):
        held.release()
    waiting.result(100)
    assert runtime.residency() == {"partial": "disk", "plain": "disk", "two": "device", "wide": "device"}
    with residency.acquire([wide]) as other:
        residency.occupy(wide, 1)
        with pytest.raises(CapacityError, match="2 that sequences are generated on"):
            runtime.run(images(5), "partial")
        residency.occupy(wide, -1)
        assert other.counted
    close(runtime.run(images(5), "partial")["logits"], expected["partial"])
    residency.occupy(two, -1)
    generated.release()


def test_what_had_to_leave_returns_from_host_memory(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    runtime = budgeted(conv_bundle, 1, host_bytes=2**30)
    for task in ALL:
        runtime.run(images(1), task)
    assert runtime.residency() == {"partial": "host", "plain": "host", "two": "host", "wide": "device"}
    for task in ALL:
        version = runtime._versions.find(task)
        version.read = no_reading
    for task in [*ALL, *ALL]:
        close(runtime.run(images(5), task)["logits"], expected[task])


def no_reading() -> Adapter:
    raise AssertionError("read again")


def test_the_host_budget_is_kept(conv_bundle: Bundle) -> None:
    size = row_bytes(conv_bundle)
    runtime = budgeted(conv_bundle, 1, host_bytes=size)
    for task in [*ALL, *ALL]:
        runtime.run(images(1), task)
        assert runtime.usage()["host_bytes"] <= size
    assert "disk" in runtime.residency().values()


def test_pinned_tasks_stay(conv_bundle: Bundle) -> None:
    runtime = budgeted(conv_bundle, 2)
    runtime.pin("two")
    for task in ALL:
        runtime.run(images(1), task)
    assert runtime.residency()["two"] == "device"
    runtime.unpin("two")
    for task in ("wide", "plain"):
        runtime.run(images(1), task)
    assert runtime.residency()["two"] == "disk"


def test_a_pin_outlives_a_replacement(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    runtime = budgeted(conv_bundle, 2)
    runtime.pin("two", folded=True)
    runtime.load("two", conv_adapters["plain"])
    assert runtime.residency()["two"] == "folded"
    for task in ("wide", "plain", "partial"):
        runtime.run(images(1), task)
    version = runtime._versions.find("two")
    assert version.row is not None


def test_no_room_beside_the_pinned_is_an_error_that_says_how_much(conv_bundle: Bundle) -> None:
    runtime = budgeted(conv_bundle, 2)
    runtime.pin("two")
    runtime.pin("wide")
    with pytest.raises(CapacityError, match=r"bring 'plain' to the device: .*2 pinned.* bytes.*device_bytes"):
        runtime.run(images(1), "plain")
    with pytest.raises(CapacityError):
        runtime.pin("plain")
    assert runtime.residency()["plain"] == "disk"
    runtime.unpin("wide")
    runtime.run(images(1), "plain")


def test_a_load_without_room_keeps_the_old_task(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    runtime = budgeted(conv_bundle, 1)
    runtime.pin("two")
    with pytest.raises(CapacityError):
        runtime.load("two", conv_adapters["wide"])
    close(runtime.run(images(5), "two")["logits"], expected["two"])


def test_a_budget_below_the_base_is_refused(conv_bundle: Bundle) -> None:
    with pytest.raises(CapacityError, match=r"a budget of 100 bytes"):
        Runtime(conv_bundle.path, provider="cpu", device_bytes=100)


def test_more_tasks_in_a_batch_than_rows_are_run_in_parts(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    runtime = budgeted(conv_bundle, 2)
    tasks = ["wide", "two", "base", "plain", "partial"]
    answers = runtime.run(images(5), tasks=tasks)["logits"]
    for row, task in enumerate(tasks):
        close(answers[row], expected[task][row])


def test_a_task_that_does_not_fit_alone_fails_in_a_batch_too(conv_bundle: Bundle) -> None:
    runtime = budgeted(conv_bundle, 1)
    runtime.pin("two")
    with pytest.raises(CapacityError, match=r"'(plain|wide)'"):
        runtime.run(images(3), tasks=["two", "plain", "wide"])


def test_larger_ranks_widen_the_rows_and_others_keep_their_answers(
    conv_bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    before = runtime._residency._bank
    large = Adapter({"stem.weight": nets.delta((12, 1, 4, 4), (12, 1, 4, 4), 7)})
    runtime.load("large", large)
    assert runtime._residency._bank is not before
    assert before.rows > 4  # the old bank is as it was
    for task in [*ALL, "base"]:
        close(runtime.run(images(5), task)["logits"], expected[task])
    runtime.unload("large")
    assert runtime._residency._bank.row_bytes > before.row_bytes


def test_rows_are_cut_again_before_a_task_has_to_leave(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    runtime = budgeted(conv_bundle, 4)
    large = Adapter({"stem.weight": nets.delta((12, 1, 4, 4), (12, 1, 4, 4), 7)})
    runtime.run(images(1), "two")
    runtime.load("large", large)
    runtime.unload("large")
    for task in ALL:
        runtime.run(images(1), task)
    assert set(runtime.residency().values()) == {"device"}


def test_rows_in_use_are_waited_for(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    runtime = budgeted(conv_bundle, 1)
    version = runtime._versions.find("two")
    answers: list[np.ndarray] = []
    waiting = threading.Thread(target=lambda: answers.append(runtime.run(images(5), "wide")["logits"]))
    with runtime._residency.acquire([version]):
        waiting.start()
        wait_until(lambda: runtime._residency._leaving is version)
        assert not answers
        assert runtime.residency()["two"] == "device"
    waiting.join(timeout=100)
    close(answers[0], expected["wide"])


def test_closing_waits_for_nobody_who_waits_for_a_row(conv_bundle: Bundle) -> None:
    runtime = budgeted(conv_bundle, 1)
    version = runtime._versions.find("two")
    with runtime._residency.acquire([version]):
        bringing = runtime.prefetch(["wide"])
        wait_until(lambda: runtime._residency._leaving is version)
        closing = threading.Thread(target=runtime.close, daemon=True)
        closing.start()
        closing.join(timeout=100)
        assert not closing.is_alive()
    with pytest.raises(RunError, match="bring 'wide' to the device: the runtime is closed"):
        bringing.result(timeout=100)


def test_the_copy_least_recently_used_is_dropped(conv_bundle: Bundle) -> None:
    runtime = budgeted(conv_bundle, 4, host_bytes=2**30)
    for task in ("two", "wide"):
        runtime.run(images(1), task)
    runtime._residency._host_bytes = runtime.usage()["host_bytes"]
    for task in ("two", "plain"):
        runtime.run(images(1), task)
    known = {task: runtime._versions.find(task) for task in ("two", "wide", "plain")}
    assert {task for task, version in known.items() if version.content} == {"two", "plain"}


def test_nothing_is_remembered_of_tasks_that_went(conv_bundle: Bundle) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1, host_bytes=2**30)
    before = runtime.usage(), len(runtime._residency._alike)
    for rank in range(1, 5):
        runtime.load("other", Adapter({"stem.weight": nets.delta((12, 1, 4, 4), (rank, 1, 4, 4), 7)}))
    read = runtime._versions.find("other")
    runtime.unload("other")
    runtime._residency._content(read)  # by someone who was about to run it
    del read
    after = runtime.usage(), len(runtime._residency._alike)
    assert after[0]["host_bytes"] == before[0]["host_bytes"]
    assert after[1] == before[1]


def test_a_set_of_a_task_replaced_just_now_is_not_remembered(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    wanted = runtime.run(images(5), {"plain": 0.5})["logits"]
    old = runtime._versions.find("plain")
    runtime.load("plain", conv_adapters["partial"])
    monkeypatch.setattr(runtime._versions, "_known", lambda *_: old)
    before = runtime.usage()
    close(runtime.run(images(5), {"plain": 0.5})["logits"], wanted)
    assert runtime.usage() == before | {"rows_written": before["rows_written"] + 1}
    assert not runtime._versions._sets


def test_a_replaced_version_serves_whoever_began_on_it(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    runtime = budgeted(conv_bundle, 3)
    old = runtime._versions.find("two")
    with runtime._residency.acquire([old]):
        runtime.load("two", conv_adapters["wide"])
        assert runtime.run(images(5), "two")["logits"].shape == (5, 17)
        close(runtime._part(None).engine.run_one(images(5), old)["logits"], expected["two"])
        runtime.unload("two")
        close(runtime._part(None).engine.run_one(images(5), old)["logits"], expected["two"])
    assert old.row is None
    with pytest.raises(UnknownTask):
        runtime.run(images(1), "two")


def test_prefetch_brings_tasks_in_the_background(conv_bundle: Bundle) -> None:
    runtime = budgeted(conv_bundle, 4)
    runtime.prefetch(["two", "wide", {"plain": 0.5, "partial": 1.0}]).result(timeout=100)
    assert runtime.residency() == {"partial": "disk", "plain": "disk", "two": "device", "wide": "device"}
    assert runtime.usage()["rows_taken"] == 3
    with pytest.raises(UnknownTask, match="prefetch task 'other'"):
        runtime.prefetch(["two", "other"])


def test_a_damaged_task_fails_alone_and_again_when_asked_again(
    own_bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    runtime = Runtime(own_bundle.path, provider="cpu", threads=1, preload=False)
    file = next((own_bundle.path / "adapters" / "two").rglob("adapter.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\0\0")
    for _ in range(2):
        with pytest.raises(IntegrityError, match="task 'two'"):
            runtime.run(images(1), "two")
        with pytest.raises(IntegrityError, match="task 'two'"):
            runtime.prefetch(["two"]).result(timeout=100)
    close(runtime.run(images(5), "wide")["logits"], expected["wide"])
    file.write_bytes(data)
    close(runtime.run(images(5), "two")["logits"], expected["two"])


def test_the_bundles_new_version_is_loaded_by_name(own_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    runtime = Runtime(own_bundle.path, provider="cpu", threads=1)
    own_bundle.add("two", conv_adapters["wide"])
    own_bundle.add("new", conv_adapters["two"])
    assert runtime.run(images(1), "two")["logits"].shape == (1, 2)
    assert "new" not in runtime.tasks
    runtime.load("two")
    runtime.load("new")
    assert runtime.run(images(1), "two")["logits"].shape == (1, 17)
    assert runtime.run(images(1), "new")["logits"].shape == (1, 2)
    with pytest.raises(UnknownTask):
        runtime.load("missing")


def test_one_cold_task_asked_for_at_once_is_read_once(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    runtime = budgeted(conv_bundle, 4)
    version = runtime._versions.find("wide")
    read, reads = version.read, []

    def slowly() -> Adapter:
        reads.append(1)
        time.sleep(0.05)
        return read()

    version.read = slowly
    runtime._residency._host_bytes = 2**30
    answers: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: answers.append(runtime.run(images(5), "wide")["logits"])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    for answer in answers:
        close(answer, expected["wide"])


def test_rows_cannot_be_asked_for_without_holding_them(conv_bundle: Bundle) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    version = runtime._versions.find("two")
    with pytest.raises(RuntimeError, match="without being acquired"):
        runtime._residency.rows([version])


def test_a_version_that_is_held_for_long_keeps_its_answers_while_the_bank_grows_and_the_task_is_replaced(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    """As a generation holds one: acquired once, and asked for its row in the present bank before each step."""
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1, preload=False)
    residency, two = runtime._residency, runtime._versions.find("two")
    with residency.acquire([two, runtime._versions.base, two]) as held:
        assert two.users == 1
        banks = []
        for step in (
            partial(runtime.prefetch, []),
            partial(runtime.run, images(1), "wide"),
            partial(runtime.load, "two", conv_adapters["wide"]),
            partial(runtime.unload, "two"),
        ):
            step()
            bank, (row, base, again) = held.rows()
            assert (row, base) == (again, 0)
            banks.append(bank)
            close(runtime._part(None).engine.run_one(images(5), two, held=True)["logits"], expected["two"])
        assert banks[0] is not banks[1]
        assert not two.current
    assert (two.users, two.row) == (0, None)
    assert residency.try_acquire([two]) is None
    with pytest.raises(RuntimeError, match="without being acquired"):
        held.rows()


def test_the_base_is_held_without_a_count(conv_bundle: Bundle) -> None:
    with (
        Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime,
        runtime._residency.acquire([runtime._versions.base]) as held,
    ):
        assert held.rows()[1] == [0]
        assert not held.counted


def test_no_adapter_is_read_to_know_a_bundle_however_many_tasks_it_has(
    conv_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    place = tmp_path / "many"
    shutil.copytree(conv_bundle.path, place)
    source = place / "adapters" / "two"
    for number in range(500):
        other = place / "adapters" / f"n{number}"
        shutil.copytree(source, other, copy_function=lambda a, b: Path(b).hardlink_to(a))
    read: list[str] = []
    adapter = Bundle.adapter

    def reading(own: Bundle, task: str) -> Adapter:
        read.append(task)
        return adapter(own, task)

    monkeypatch.setattr(Bundle, "adapter", reading)
    runtime = Runtime(place, provider="cpu", threads=1, preload=False)
    assert len(runtime.tasks) == 504
    assert not read
    assert runtime.run(images(1), "n499")["logits"].shape == (1, 2)

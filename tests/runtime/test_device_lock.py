"""A recording has the device to itself, and neither recordings nor what they keep waiting starve."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers.runtime.banks import all_tasks
from tests.helpers.waiting import SECONDS, wait_until
from tpeft_deploy import Bundle
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.device_lock import DeviceLock
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.runtime.sessions.providers import Choice


class Thread(threading.Thread):
    """A thread that hands its exception to whoever joins it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def done(self) -> None:
        self.join(SECONDS)
        assert not self.is_alive(), "stuck"
        if self._error is not None:
            raise self._error


class Owner:
    """Something whose end is seen."""

    def __init__(self, ended: list[str]) -> None:
        self.held = _Held(ended)


class _Held:
    def __init__(self, ended: list[str]) -> None:
        self._ended = ended

    def __del__(self) -> None:
        self._ended.append(threading.current_thread().name)


def test_a_recording_is_beside_nobody() -> None:
    lock, inside, beside = DeviceLock(), [0], []  # type: DeviceLock, list[int], list[str]

    def share() -> None:
        for turn in range(200):
            with lock.shared_long() if turn % 3 == 0 else lock.shared():
                if inside[0]:
                    beside.append("a holder beside a recording")
                if turn % 5 == 0:
                    time.sleep(0)

    def record() -> None:
        for turn in range(50):
            with lock.recording(wait=turn % 2 == 0) as alone:
                if not alone:
                    continue
                inside[0] += 1
                time.sleep(0)
                if inside[0] != 1 or lock._sharing:
                    beside.append("a recording beside another")
                inside[0] -= 1

    threads = [Thread(call) for call in (share, share, share, record, record)]
    for thread in threads:
        thread.done()
    assert beside == []
    assert (lock._sharing, lock._long, lock._recording, lock._recorders, lock._waiting) == (0, 0, False, 0, 0)


def test_holders_are_beside_each_other() -> None:
    lock, met = DeviceLock(), threading.Barrier(3)

    def share() -> None:
        with lock.shared():
            met.wait(SECONDS)

    for thread in [Thread(share) for _ in range(3)]:
        thread.done()


def test_a_waiting_recording_is_not_overtaken_by_a_stream_of_runs() -> None:
    lock, stop, order = DeviceLock(), threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            with lock.shared():
                pass

    first_in, first_out = threading.Event(), threading.Event()

    def first() -> None:
        with lock.shared():
            first_in.set()
            first_out.wait(SECONDS)

    def record() -> None:
        with lock.recording(wait=True):
            order.append("record")

    def late() -> None:
        with lock.shared():
            order.append("late")

    holding = Thread(first)
    first_in.wait(SECONDS)
    stream = [Thread(run) for _ in range(3)]
    recorder = Thread(record)
    wait_until(lambda: lock._recorders == 1)
    latecomer = Thread(late)
    wait_until(lambda: lock._waiting >= 1)
    first_out.set()
    for thread in (holding, recorder, latecomer):
        thread.done()
    stop.set()
    for thread in stream:
        thread.done()
    assert order == ["record", "late"]


def test_who_waited_for_a_recording_goes_before_the_next() -> None:
    lock, order = DeviceLock(), []
    begun, end = threading.Event(), threading.Event()

    def record() -> None:
        with lock.recording(wait=True):
            order.append("record")
            begun.set()
            end.wait(SECONDS)

    def share() -> None:
        with lock.shared():
            order.append("run")

    first = Thread(record)
    begun.wait(SECONDS)
    second = Thread(record)
    wait_until(lambda: lock._recorders == 1)
    runs = [Thread(share) for _ in range(3)]
    wait_until(lambda: lock._waiting == 3)
    end.set()
    for thread in (first, second, *runs):
        thread.done()
    assert order == ["record", "run", "run", "run", "record"]


def test_a_recording_need_not_wait_for_a_session_that_opens() -> None:
    lock, opened = DeviceLock(), threading.Event()
    inside = threading.Event()

    def opening() -> None:
        with lock.shared_long():
            inside.set()
            opened.wait(SECONDS)

    thread = Thread(opening)
    inside.wait(SECONDS)
    with lock.recording(wait=False) as alone:
        assert not alone
    with lock.shared():  # nor does it keep runs waiting
        pass
    opened.set()
    thread.done()
    with lock.recording(wait=False) as alone:
        assert alone


def test_reentrancy() -> None:
    lock = DeviceLock()
    with lock.shared(), lock.shared_long(), lock.shared():
        assert (lock._sharing, lock._long) == (1, 0)
        with pytest.raises(RuntimeError, match="wait for itself"), lock.recording(wait=True):
            pass
    with lock.recording(wait=True), lock.shared():
        assert lock._sharing == 0
    with lock.recording(wait=True):
        pass


def test_a_holder_takes_the_lock_again_while_a_recording_waits() -> None:
    lock, recorded = DeviceLock(), threading.Event()

    def record() -> None:
        with lock.recording(wait=True):
            recorded.set()

    with lock.shared():
        thread = Thread(record)
        wait_until(lambda: lock._recorders == 1)
        with lock.shared():
            assert not recorded.is_set()
    thread.done()


def test_an_error_lets_the_lock_go() -> None:
    lock = DeviceLock()
    with pytest.raises(KeyError), lock.recording(wait=True):
        raise KeyError
    with pytest.raises(KeyError), lock.shared():
        raise KeyError
    with lock.recording(wait=False) as alone:
        assert alone


def test_what_goes_during_a_recording_is_freed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, ended = DeviceLock(), []  # type: DeviceLock, list[str]
    monkeypatch.setattr(device_lock, "DEVICE", lock)
    owners = [Owner(ended) for _ in range(3)]
    for owner in owners:
        device_lock.free_safely(owner)
    del owner

    with lock.recording(wait=True):
        Thread(owners.clear).done()
        gc.collect()
        assert ended == []
    assert len(ended) == 3


def test_what_goes_at_another_time_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, ended = DeviceLock(), []  # type: DeviceLock, list[str]
    monkeypatch.setattr(device_lock, "DEVICE", lock)
    owner = Owner(ended)
    device_lock.free_safely(owner)
    del owner
    assert len(ended) == 1
    with lock.shared():
        owner = Owner(ended)
        device_lock.free_safely(owner)
        del owner
        assert len(ended) == 2


def test_a_free_in_the_middle_of_the_lock_itself_waits() -> None:
    """As when a garbage collection interrupts the thread that has the mutex."""
    lock, ended = DeviceLock(), []  # type: DeviceLock, list[str]
    with lock._mutex:
        lock.free({"held": _Held(ended)})
        assert ended == []
    with lock.shared():
        pass
    assert len(ended) == 1


def test_the_cpu_takes_no_lock(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(device_lock, "DEVICE", None)
        with device_lock.using("cpu"), device_lock.opening("cpu"):
            pass
        bank, rows = all_tasks(conv_bundle)
        bank.write(1, {})
        inputs = {"pixels": np.zeros((2, 1, 12, 14), np.float32)}
        choice = Choice("cpu", "a test")
        Session(conv_bundle.path / "banked.onnx", SessionFactory(choice)).run(bank, inputs, np.array([rows["wide"]]))
        Plain(conv_bundle.path / "base.onnx", SessionFactory(choice)).run(inputs)


def test_cuda_takes_the_lock() -> None:
    for held in (device_lock.using("cuda"), device_lock.opening("cuda")):
        with held:
            assert device_lock.DEVICE._sharing == 1

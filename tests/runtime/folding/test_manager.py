"""Sessions of their own come and go while tasks are served; nothing is folded onto a fold."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.waiting import SECONDS, wait_until
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import RunError, UnknownTask
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.folding import manager, merge

INPUTS = {"pixels": np.random.default_rng(0).standard_normal((5, 1, 12, 14)).astype(np.float32)}
ALL = ["partial", "plain", "two", "wide"]


@pytest.fixture(scope="module")
def expected(conv_bundle: Bundle) -> dict[str, np.ndarray]:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    return {task: runtime.run(INPUTS, task)["logits"] for task in [*ALL, "base"]}


def close(answer: object, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(answer), wanted, rtol=1e-4, atol=1e-6)


def wait_for(what: str, runtime: Runtime, tier: str) -> None:
    wait_until(lambda: runtime.residency()[what] == tier, f"{what} on tier {tier}")


def test_every_task_folds_and_unfolds_again_and_again(conv_bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
        for task in [*ALL, *ALL]:
            runtime.pin(task, folded=True)
            assert runtime.residency()[task] == "folded"
            close(runtime.run(INPUTS, task)["logits"], expected[task])
            rows = runtime.run(INPUTS, tasks=[task] * 5)["logits"]
            assert len(rows) == 5
            mixed = runtime.run(INPUTS, tasks=[task, "base", "two", task, "plain"])["logits"]
            close(mixed[0], expected[task][0])
            runtime.unpin(task)
            assert runtime.residency()[task] == "device"
            close(runtime.run(INPUTS, task)["logits"], expected[task])
        assert runtime.usage()["folded_bytes"] == 0


def test_the_base_gets_a_session_of_its_own_once_it_is_asked_for(
    conv_bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    close(runtime.run(INPUTS)["logits"], expected["base"])
    runtime._part(None).folds.begin(runtime._versions.base).result(timeout=100)
    assert runtime._part(None).folds.find(runtime._versions.base, 1) is not None
    close(runtime.run(INPUTS)["logits"], expected["base"])
    close(np.stack(list(runtime.run(INPUTS, tasks=["base"] * 5)["logits"])), expected["base"])


def test_a_replaced_task_is_folded_from_the_base_and_not_from_its_fold(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], expected: dict[str, np.ndarray]
) -> None:
    """TensorRT 3628: refitting on top of what was refitted gives a blend."""
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    runtime.pin("two", folded=True)
    for other in ("wide", "plain", "two"):
        runtime.load("two", conv_adapters[other])
        assert runtime.residency()["two"] == "folded"
        close(runtime.run(INPUTS, "two")["logits"], expected[other])


def test_hot_tasks_are_folded_and_cold_ones_unfolded(
    conv_bundle: Bundle, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "_DECIDE", 0.02)
    size = merge.cost(conv_bundle, conv_bundle.adapter("two"), shared=True)
    biggest = 2 * sum(weight.length for weight in conv_bundle.manifest.weights.values())
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1, folded_bytes=max(size, biggest))
    until = time.monotonic() + SECONDS
    while runtime.residency()["wide"] != "folded" and time.monotonic() < until:
        close(runtime.run(INPUTS, "wide")["logits"], expected["wide"])
    assert runtime.residency()["wide"] == "folded"
    while runtime.residency()["plain"] != "folded" and time.monotonic() < until:
        close(runtime.run(INPUTS, "plain")["logits"], expected["plain"])
    assert runtime.residency()["plain"] == "folded"
    wait_for("wide", runtime, "device")


def test_without_a_budget_nothing_is_folded_unasked(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_DECIDE", 0.0)
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    for _ in range(500):
        runtime.run(INPUTS, "wide")
    assert set(runtime.residency().values()) == {"device"}


def test_a_fold_that_answers_otherwise_is_not_served(
    conv_bundle: Bundle, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """add_initializer that is ignored after constant folding serves the base in silence (research, section 4)."""
    real = merge.weights
    monkeypatch.setattr(
        merge, "weights", lambda bundle, adapter: {n: a * np.float32(1.01) for n, a in real(bundle, adapter).items()}
    )
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    with pytest.raises(RunError, match=r"fold task 'plain': expected the answer of the banked graph"):
        runtime.pin("plain", folded=True)
    assert runtime.residency()["plain"] == "device"
    close(runtime.run(INPUTS, "plain")["logits"], expected["plain"])


def test_a_load_that_cannot_be_folded_leaves_nothing_behind(
    conv_bundle: Bundle,
    conv_adapters: dict[str, Adapter],
    expected: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    runtime.pin("two", folded=True)
    real, before = merge.weights, runtime.usage()
    monkeypatch.setattr(
        merge, "weights", lambda bundle, adapter: {n: a * np.float32(1.01) for n, a in real(bundle, adapter).items()}
    )
    with pytest.raises(RunError, match="fold task 'two'"):
        runtime.load("two", conv_adapters["plain"])
    assert runtime.usage() == before | {"rows_written": before["rows_written"] + 1}
    assert runtime.residency()["two"] == "folded"
    close(runtime.run(INPUTS, "two")["logits"], expected["two"])


@pytest.mark.parametrize("between", ["unpin", "pin"])
def test_a_task_unpinned_or_pinned_while_it_is_replaced_is_so_afterwards(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    if between == "unpin":
        runtime.pin("two")
    put = runtime._versions.put

    def and_meanwhile(versions: dict[str, Version]) -> None:
        for task in versions:
            getattr(runtime, between)(task)
        put(versions)

    monkeypatch.setattr(runtime._versions, "put", and_meanwhile)
    runtime.load("two", conv_adapters["plain"])
    version = runtime._versions.find("two")
    assert version.pinned == (between == "pin")


def test_runs_go_on_while_a_task_is_folded(
    conv_bundle: Bundle, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    real = merge.fold

    def slowly(*arguments: object, **options: object) -> object:
        entered.set()
        assert go_on.wait(100)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "fold", slowly)
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    pinning = threading.Thread(target=runtime.pin, args=("wide",), kwargs={"folded": True})
    pinning.start()
    assert entered.wait(100)
    for _ in range(20):
        close(runtime.run(INPUTS, "wide")["logits"], expected["wide"])
    assert runtime.residency()["wide"] == "device"
    go_on.set()
    pinning.join()
    assert runtime.residency()["wide"] == "folded"


def test_what_is_left_on_disk_goes_with_the_runtime(conv_bundle: Bundle) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    runtime.pin("wide", folded=True)
    place: Path = runtime._base.path
    assert place.is_dir()
    runtime.close()
    assert not place.exists()


def test_a_fold_that_fails_at_once_holds_nobody_up(conv_bundle: Bundle) -> None:
    """A job that is done before anybody listens reports in the thread that begins it."""
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    version = runtime._versions.find("wide")

    def refused(*_: object) -> Future[None]:
        job: Future[None] = Future()
        job.set_exception(RunError("fold", problem="no"))
        return job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime._part(None).folds._worker, "submit", refused)
        beginning = threading.Thread(target=runtime._part(None).folds.begin, args=(version,), daemon=True)
        beginning.start()
        beginning.join(100)
    assert not beginning.is_alive()
    runtime.pin("wide", folded=True)


def test_nothing_is_kept_of_what_is_folded_after_its_task_went(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1, folded_bytes=2**30)
    old = runtime._versions.find("wide")
    runtime.load("wide", conv_adapters["wide"])
    runtime._part(None).folds.keep(old).result(100)
    runtime._part(None).folds.find(old, 1)
    held = (runtime._part(None).folds._jobs, runtime._part(None).folds._costs, runtime._part(None).folds._sessions)
    assert not any(old in own for own in held)
    heat = runtime._part(None).folds._heat
    assert heat is not None
    assert not any(old in own for own in (heat._pinned, heat._rows))


def test_a_base_that_is_asked_for_after_closing_is_served_from_the_bank(
    conv_bundle: Bundle, expected: dict[str, np.ndarray]
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    runtime.close()
    close(runtime.run(INPUTS)["logits"], expected["base"])
    with pytest.raises(RunError, match="closed"):
        runtime.pin("wide", folded=True)


@pytest.mark.parametrize("call", ["pin", "unpin"])
def test_only_tasks_can_be_pinned(conv_bundle: Bundle, call: str) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    for task in ("base", "other"):
        with pytest.raises(UnknownTask, match=f"{call} task '{task}'"):
            getattr(runtime, call)(task)

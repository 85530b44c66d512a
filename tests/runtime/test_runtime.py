from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import BundleError, FormatError, InputError, ShapeError, UnknownTask

Images = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def runtime(conv_bundle: Bundle) -> Runtime:
    return Runtime(conv_bundle.path, provider="cpu", threads=1)


def images(rows: int, seed: int = 0) -> Images:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


def test_heads_of_different_sizes(runtime: Runtime) -> None:
    assert runtime.tasks == ["partial", "plain", "two", "wide"]
    for task, classes in [("base", 10), ("plain", 10), ("partial", 10), ("two", 2), ("wide", 17)]:
        logits = runtime.run(images(3), task=task)["logits"]
        assert logits.shape == (3, classes)
        assert logits.flags.c_contiguous
    rows = runtime.run(images(3), tasks=["two", "wide", "base"])["logits"]
    assert [row.shape for row in rows] == [(2,), (17,), (10,)]


def test_ranks_are_the_largest_of_each_adapter_that_was_read(towers_bundle: Bundle) -> None:
    tasks = ["both", "seeing", "heads", "base", "none"]
    with Runtime(towers_bundle.path, provider="cpu", threads=1) as runtime:
        runtime.prefetch(["both", "seeing", "heads"]).result()
        assert runtime.ranks(tasks) == {"both": 3, "seeing": 4, "heads": 1}


def test_one_task_for_all_rows_equals_that_task_for_each_row(runtime: Runtime) -> None:
    whole = runtime.run(images(4), task="two")["logits"]
    rows = runtime.run(images(4), tasks=["two"] * 4)["logits"]
    np.testing.assert_allclose(np.stack(list(rows)), whole, rtol=1e-5, atol=1e-6)


def test_the_order_of_rows_does_not_matter(runtime: Runtime) -> None:
    tasks = ["two", "base", "wide", "plain", "partial"]
    order = [3, 0, 4, 2, 1]
    straight = runtime.run(images(5), tasks=tasks)["logits"]
    shuffled = runtime.run({"pixels": images(5)["pixels"][order]}, tasks=[tasks[i] for i in order])["logits"]
    for place, row in enumerate(order):
        np.testing.assert_allclose(shuffled[place], straight[row], rtol=1e-5, atol=1e-6)


def test_switching_back_and_forth_is_bit_identical(runtime: Runtime) -> None:
    first = runtime.run(images(2), task="plain")["logits"]
    runtime.run(images(2), task="wide")
    np.testing.assert_array_equal(runtime.run(images(2), task="plain")["logits"], first)


def test_answers_do_not_share_memory_with_later_runs(runtime: Runtime) -> None:
    first = runtime.run(images(2), task="plain")["logits"]
    kept = first.copy()
    for seed in range(5):
        runtime.run(images(2, seed), task="two")
        runtime.run(images(2, seed), task="plain")
    np.testing.assert_array_equal(first, kept)


def test_load_and_unload(conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu")
    expected = runtime.run(images(2), task="two")["logits"]
    runtime.load("again", conv_adapters["two"])
    np.testing.assert_array_equal(runtime.run(images(2), task="again")["logits"], expected)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(conv_adapters["wide"].to_bytes())
    runtime.load("again", file)
    assert runtime.run(images(2), task="again")["logits"].shape == (2, 17)
    runtime.unload("again")
    runtime.unload("two")
    assert runtime.tasks == ["partial", "plain", "wide"]
    with pytest.raises(UnknownTask, match=r"run task 'two'"):
        runtime.run(images(2), task="two")
    assert runtime.name == "conv"


def test_a_load_that_fails_leaves_the_old_task_serving(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu")
    before = runtime.run(images(2), task="plain")["logits"]
    truncated = tmp_path / "adapter.safetensors"
    truncated.write_bytes(conv_adapters["two"].to_bytes()[:-9])
    with pytest.raises(FormatError, match="safetensors"):
        runtime.load("plain", truncated)
    with pytest.raises(FormatError, match="nothing there"):
        runtime.load("plain", tmp_path / "missing")
    with pytest.raises(ShapeError):
        runtime.load("plain", Adapter({"stem.weight": nets.delta((12, 1, 3, 3), (1, 1, 3, 3), 0)}))
    for name in ("base", "conv", "a/b"):
        with pytest.raises(BundleError):
            runtime.load(name, conv_adapters["two"])
    with pytest.raises(UnknownTask):
        runtime.unload("base")
    np.testing.assert_array_equal(runtime.run(images(2), task="plain")["logits"], before)


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "message"),
    [
        (images(3), {"task": "other"}, UnknownTask, "expected one of base, partial, plain, two, wide, got 'other'"),
        (images(3), {"tasks": ["two", "two", "other"]}, UnknownTask, "run task 'other' for row 2"),
        (images(3), {"tasks": ["two"]}, InputError, "one task per row, 3 for its 3 rows, got 1 tasks"),
        (images(3), {"tasks": "two"}, InputError, "the string 'two'"),
        (images(3), {"task": "two", "tasks": ["two"] * 3}, InputError, "task or tasks, got both"),
        ({}, {}, InputError, "inputs pixels, got no 'pixels'"),
        (images(1) | {"more": np.zeros(1)}, {}, InputError, "an unknown 'more'"),
        ({"pixels": images(1)["pixels"].astype(float)}, {}, InputError, r"float32, got float64. Convert"),
        ({"pixels": images(1)["pixels"][0]}, {}, InputError, r"\[batch, 1, 12, 14\], got \[1, 12, 14\]"),
        ({"pixels": np.zeros((1, 1, 12, 13), np.float32)}, {}, InputError, r"got \[1, 1, 12, 13\]"),
        ({"pixels": np.zeros((0, 1, 12, 14), np.float32)}, {"tasks": []}, InputError, "at least one row"),
        ({"pixels": np.zeros((0, 1, 12, 14), np.float32)}, {}, InputError, "at least one row"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_they_run(
    runtime: Runtime, inputs: Images, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        runtime.run(inputs, **arguments)  # type: ignore[call-overload]


def test_threads_get_their_own_answers_while_tasks_come_and_go(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1)
    tasks = ["two", "plain", "wide", "base", "partial"]
    expected = {task: runtime.run(images(5), task=task)["logits"] for task in tasks}
    wrong: list[str] = []
    done = threading.Event()

    def caller(offset: int) -> None:
        own = tasks[offset:] + tasks[:offset]
        for _ in range(150):
            rows = runtime.run(images(5), tasks=own)["logits"]
            wrong.extend(
                task
                for row, task in enumerate(own)
                if not np.allclose(rows[row], expected[task][row], rtol=1e-4, atol=1e-5)
            )

    def changer() -> None:
        while not done.is_set():
            runtime.load("guest", conv_adapters["wide"])
            runtime.unload("guest")

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    change = threading.Thread(target=changer)
    change.start()
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    done.set()
    change.join()
    assert wrong == []

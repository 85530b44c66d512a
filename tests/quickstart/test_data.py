from itertools import pairwise

import numpy as np
import pytest

from tpeft_deploy.quickstart.data import SIZE, TASKS, Digits, DigitTask, load_digits


@pytest.fixture(scope="module")
def split() -> tuple[Digits, Digits]:
    return load_digits(0)


def test_a_quarter_is_held_out_with_every_digit_in_proportion(split: tuple[Digits, Digits]) -> None:
    train, test = split
    assert (len(train), len(test)) == (1347, 450)
    shares = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.all(np.abs(shares - 0.25) < 0.01)


def test_no_held_out_scan_is_trained_on(split: tuple[Digits, Digits]) -> None:
    train, test = split
    seen = {picture.tobytes() for picture in train.pixels}
    assert not seen & {picture.tobytes() for picture in test.pixels}


def test_the_seed_chooses_the_split(split: tuple[Digits, Digits]) -> None:
    assert np.array_equal(load_digits(0)[1].pixels, split[1].pixels)
    assert not np.array_equal(load_digits(1)[1].pixels, split[1].pixels)


def test_enlarging_keeps_the_corners_and_the_mean(split: tuple[Digits, Digits]) -> None:
    from sklearn.datasets import load_digits as bundled

    scans = bundled().images / 16
    both = np.concatenate([examples.pixels[:, 0] for examples in split])
    corners = {corner.tobytes() for corner in scans[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(np.float32)}
    assert {corner.tobytes() for corner in both[:, [0, 0, -1, -1], [0, -1, 0, -1]]} == corners
    assert both.mean() == pytest.approx(scans.mean(), rel=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_pictures_of_every_task(task: DigitTask, split: tuple[Digits, Digits]) -> None:
    test = split[1]
    changed = task.examples(test, 3)
    assert changed.pixels.shape == (450, 1, SIZE, SIZE)
    assert changed.pixels.dtype == np.float32
    assert changed.pixels.flags.c_contiguous
    assert changed.pixels.min() >= 0
    assert changed.pixels.max() <= 1
    assert changed.labels.dtype == np.int64
    assert set(changed.labels) == set(range(len(task.answers)))
    assert not np.array_equal(changed.pixels, test.pixels)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_same_seed_gives_the_same_pictures(task: DigitTask, split: tuple[Digits, Digits]) -> None:
    first, again = (task.examples(split[1], 5) for _ in range(2))
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.labels, again.labels)


def test_four_quarter_turns_two_mirrors_and_two_shifts_are_nothing(split: tuple[Digits, Digits]) -> None:
    tasks = {task.name: task for task in TASKS}
    for name, times in (("rotated", 4), ("mirrored", 2), ("shifted", 2)):
        steps = [split[1]]
        for _ in range(times):
            steps.append(tasks[name].examples(steps[-1], 0))
        assert np.array_equal(steps[-1].pixels, steps[0].pixels)
        assert not any(np.array_equal(a.pixels, b.pixels) for a, b in pairwise(steps))


def test_upright_turns_one_half(split: tuple[Digits, Digits]) -> None:
    test = split[1]
    upright = next(task for task in TASKS if task.name == "upright").examples(test, 1)
    down = upright.labels == 1
    assert down.sum() == 225
    assert np.array_equal(upright.pixels[~down], test.pixels[~down])
    assert np.array_equal(upright.pixels[down], test.pixels[down][..., ::-1, ::-1])


def test_only_upright_brings_its_own_head() -> None:
    assert [task.name for task in TASKS if not task.shares_head] == ["upright"]

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tpeft_deploy.runtime.devices.placement import Placement


def drive(placement: Placement, rates: dict[str, int], start: int, seconds: int) -> None:
    for second in range(start, start + seconds):
        for task, rate in rates.items():
            for _ in range(rate):
                placement.record(task, second)


def test_cold_tasks_live_on_one_device_each_and_on_all_devices_alike() -> None:
    placement = Placement(3)
    homes = [placement.homes(f"t{n}", 0.0) for n in range(9)]
    assert Counter(homes) == {(0,): 3, (1,): 3, (2,): 3}
    assert [placement.homes(f"t{n}", 100.0) for n in range(9)] == homes


def test_a_hot_task_lives_on_several_and_those_beside_it_on_one() -> None:
    placement = Placement(4)
    rates = {"hot": 40, "warm": 10, **{f"cold{n}": 1 for n in range(8)}}
    drive(placement, rates, 0, 30)
    homes = {task: placement.homes(task, 30) for task in rates}
    assert len(homes.pop("hot")) == 4
    assert len(homes.pop("warm")) == 2  # 17 % of the load of four devices
    assert {len(own) for own in homes.values()} == {1}


def test_a_task_alone_on_an_idle_machine_is_not_hot() -> None:
    placement = Placement(2)
    for minute in range(60):
        placement.record("rare", 60.0 * minute)
    assert len(placement.homes("rare", 3600.0)) == 1


def test_a_task_that_cools_goes_back_to_its_first_device() -> None:
    placement = Placement(2)
    first = placement.homes("a", 0)
    drive(placement, {"a": 50, "b": 5}, 0, 20)
    both = placement.homes("a", 20)
    assert both[:1] == first
    assert set(both) == {0, 1}
    drive(placement, {"b": 10, "c": 10, "d": 10, "e": 10}, 20, 400)
    assert placement.homes("a", 420) == first


def test_a_task_near_the_border_does_not_move_to_and_fro() -> None:
    placement = Placement(2)
    settled = []
    for block in range(40):  # a quarter of the load and a little more or less makes one device or two
        share = 11 if block % 2 else 10
        drive(placement, {"a": share, "b": 31 - share}, 5 * block, 5)
        settled.append(len(placement.homes("a", 5 * block + 5)))
    assert settled[5:] == sorted(settled[5:])


def test_a_new_task_comes_to_the_device_with_the_least_load() -> None:
    placement = Placement(2)
    assert [placement.homes(task, 0) for task in ("a", "b")] == [(0,), (1,)]
    placement.record("a", 0)
    assert [placement.homes(task, 0) for task in ("c", "d")] == [(1,), (1,)]


def test_a_pinned_task_lives_everywhere_until_it_is_unpinned() -> None:
    placement = Placement(3)
    placement.homes("a", 0)
    placement.pin("a")
    assert placement.homes("a", 0) == (0, 1, 2)
    placement.unpin("a")
    assert placement.homes("a", 5) == (0,)


def test_a_task_that_is_forgotten_leaves_its_room_to_the_next() -> None:
    placement = Placement(2)
    for task in ("a", "b", "c", "d"):
        placement.homes(task, 0)
    placement.forget("a")
    placement.forget("never known")
    assert placement.homes("e", 0) == (0,)


def test_a_request_goes_to_the_devices_that_have_all_its_tasks_or_else_most() -> None:
    placement = Placement(2)
    assert [placement.homes(task, 0) for task in "abcd"] == [(0,), (1,), (0,), (1,)]
    placement.pin("base")
    assert placement.best(["a", "c", "base"], 0) == [0]
    assert placement.best(["base"], 0) == [0, 1]
    assert placement.best(["b", "a", "d", "base"], 0) == [1, 0]
    placement.record("a", 0)
    assert placement.best(["a", "b"], 0) == [1, 0]  # as many on each: to the one with less to do


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["record", "pin", "unpin", "forget"]), st.integers(0, 5), st.floats(0, 9))),
)
def test_every_task_always_has_homes_and_none_twice(devices: int, steps: list[tuple[str, int, float]]) -> None:
    placement, now = Placement(devices), 0.0
    for what, task, later in steps:
        now += later
        if what == "record":
            placement.record(f"t{task}", now)
        else:
            getattr(placement, what)(f"t{task}")
        homes = placement.homes(f"t{task}", now)
        assert homes
        assert len(set(homes)) == len(homes)
        assert set(homes) <= set(range(devices))
        assert sorted(placement.best([f"t{task}"], now)) == sorted(homes)
    for task in range(6):
        placement.forget(f"t{task}")
    assert placement._tasks == [0] * devices

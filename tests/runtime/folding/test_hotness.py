from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.counting import operations
from tpeft_deploy.runtime.folding.hotness import Heat


def drive(
    heat: Heat[Hashable], rates: dict[Hashable, int], start: int, seconds: int
) -> list[tuple[list[Hashable], list[Hashable]]]:
    """Rows every second, a decision every ten; the decisions that changed something."""
    changed = []
    for second in range(start, start + seconds):
        for key, rows in rates.items():
            heat.record(key, rows, second)
        if second % 10 == 9:
            decision = heat.decide(second)
            if decision != ([], []):
                changed.append(decision)
    return changed


def test_a_rate_is_rows_per_second_and_decays() -> None:
    heat = Heat[Hashable](1, window=60)
    drive(heat, {"a": 7}, 0, 600)
    assert heat.rate("a", 600) == pytest.approx(7, rel=0.02)
    assert heat.rate("a", 660) == pytest.approx(7 / 2.71828, rel=0.02)
    assert heat.rate("b", 660) == 0


def test_the_rate_does_not_depend_on_how_long_it_has_run() -> None:
    heat = Heat[Hashable](1, window=1)
    drive(heat, {"a": 7}, 0, 5_000)  # far beyond what exp of the whole age could hold
    assert heat.rate("a", 4_999) == pytest.approx(7 / (1 - 1 / 2.71828), rel=1e-3)


def test_the_hottest_are_folded_and_what_cools_down_is_let_go() -> None:
    heat = Heat[Hashable](2, minimum=1)
    drive(heat, {"a": 10, "b": 5, "c": 2}, 0, 300)
    assert heat.folded == {"a", "b"}
    drive(heat, {"c": 20}, 300, 300)
    assert heat.folded == {"c"}
    heat.decide(5_000)
    assert heat.folded == set()


def test_nothing_is_folded_below_the_minimum() -> None:
    heat = Heat[Hashable](5, minimum=3)
    assert drive(heat, {"a": 2}, 0, 1_000) == []
    drive(heat, {"a": 4}, 1_000, 300)
    assert heat.folded == {"a"}
    assert drive(heat, {"a": 3}, 1_300, 300) == []
    drive(heat, {"a": 1}, 1_600, 300)
    assert heat.folded == set()


def test_tasks_of_similar_rate_do_not_take_turns() -> None:
    heat = Heat[Hashable](1)
    changes = 0
    for phase in range(40):
        hot, other = ("a", "b") if phase % 2 else ("b", "a")
        changes += len(drive(heat, {hot: 11, other: 9}, 60 * phase, 60))
    assert changes == 1
    (before,) = heat.folded
    assert drive(heat, {"c": 40}, 2_400, 300) == [(["c"], [before])]


def test_costs_in_bytes() -> None:
    costs: dict[Hashable, int] = {"large": 90, "small": 30, "tiny": 10, "huge": 101}
    heat = Heat[Hashable](100, cost=costs.__getitem__)
    drive(heat, {"huge": 90, "large": 40, "small": 20, "tiny": 10}, 0, 300)
    assert heat.folded == {"large", "tiny"}


def test_pinned_keys_are_folded_whatever_the_budget() -> None:
    heat = Heat[Hashable](2)
    heat.pin("x")
    assert heat.decide(0) == (["x"], [])
    drive(heat, {"a": 10, "b": 20}, 0, 300)
    assert heat.folded == {"x", "b"}
    heat.pin("y")
    heat.pin("z")
    assert heat.decide(300) == (["y", "z"], ["b"])
    for key in "xyz":
        heat.unpin(key)
    fold, unfold = heat.decide(300)
    assert set(fold) == {"a", "b"}
    assert unfold == ["x", "y", "z"]


def test_what_cannot_be_folded_is_not_asked_for_again() -> None:
    heat = Heat[Hashable](1)
    drive(heat, {"a": 10, "b": 5}, 0, 100)
    assert heat.folded == {"a"}
    heat.refuse("a")
    assert heat.decide(100) == (["b"], [])
    assert heat.decide(101) == ([], [])
    heat.forget("a")
    heat.forget("b")
    assert heat.rate("a", 101) == 0
    assert heat.decide(101) == ([], [])


def test_memory_is_bounded_and_the_hot_are_remembered() -> None:
    heat = Heat[Hashable](1, most=100)
    for second in range(2_000):
        heat.record("hot", 5, second)
        heat.record(second, 1, second)
    assert heat.decide(2_000) == (["hot"], [])
    assert heat.rate("hot", 2_000) == pytest.approx(5, rel=0.02)
    assert len(heat._rows) <= 101


@pytest.mark.parametrize("wrong", [{"window": 0}, {"minimum": 0}, {"margin": 0.5}, {"most": 1}, {"budget": -1}])
def test_arguments_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="budget >= 0"):
        Heat[Hashable](**{"budget": 1, **wrong})  # type: ignore[arg-type]


KEYS = st.integers(0, 9)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("record"), KEYS, st.integers(1, 500)),
        st.tuples(st.sampled_from(["pin", "unpin", "forget", "refuse", "decide"]), KEYS, st.just(0)),
    ),
    max_size=80,
)


@settings(deadline=None)
@given(events=EVENTS, budget=st.integers(0, 30), costs=st.lists(st.integers(1, 12), min_size=10, max_size=10))
def test_automatic_choices_stay_within_what_pinned_ones_leave(
    events: list[tuple[str, int, int]], budget: int, costs: list[int]
) -> None:
    heat = Heat[Hashable](budget, cost=lambda key: costs[int(str(key))], minimum=0.1)
    pinned: set[Hashable] = set()
    applied: set[Hashable] = set()
    for now, (what, key, rows) in enumerate([*events, ("decide", 0, 0)]):
        if what == "record":
            heat.record(key, rows, now)
        elif what == "decide":
            fold, unfold = heat.decide(now)
            assert not set(fold) & applied
            assert set(unfold) <= applied
            applied = (applied - set(unfold)) | set(fold)
            assert applied == heat.folded
            assert pinned <= applied
            own = sum(costs[int(str(k))] for k in applied - pinned)
            assert own <= max(0, budget - sum(costs[int(str(k))] for k in pinned))
        else:
            getattr(heat, what)(key)
            pinned = pinned | {key} if what == "pin" else pinned - {key}
            applied -= {key} if what in ("forget", "refuse") else set()


@settings(deadline=None, max_examples=25)
@given(rates=st.lists(st.integers(2, 50), min_size=2, max_size=8), budget=st.integers(1, 4))
def test_steady_rates_lead_to_a_steady_choice_that_holds_the_hottest(rates: list[int], budget: int) -> None:
    heat = Heat[Hashable](budget)
    keys: dict[Hashable, int] = dict(enumerate(rates))
    drive(heat, keys, 0, 300)
    assert drive(heat, keys, 300, 300) == []
    assert len(heat.folded) == min(budget, len(rates))
    coldest = min(rates[int(str(key))] for key in heat.folded)
    assert all(rate <= 1.5 * coldest for key, rate in keys.items() if key not in heat.folded)


def test_a_record_costs_the_same_whatever_the_number_of_tasks() -> None:
    costs = []
    for count in (100, 10_000):
        heat = Heat[Hashable](10)
        for key in range(count):
            heat.record(key, 1, 0.0)
        costs.append(operations(partial(heat.record, 77, 4, 1.0)))
    assert costs[0] == costs[1] < 100  # less than a microsecond

"""Which replica computes the rows of an adapter."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scale_simulation
from tpeft_deploy.runtime.cluster.placement import AffinePlacement, Demand, PlacementCosts, RowsPart

FEW = {f"replica-{index}": 1.0 for index in range(10)}
ADAPTERS = [f"{index:064x}" for index in range(2000)]


def of(weights: dict[str, float], settings: PlacementCosts | None = None) -> AffinePlacement:
    own = AffinePlacement(settings)
    own.update(weights)
    return own


def nowhere(name: str, digest: str) -> bool:
    return False


def firsts(placement: AffinePlacement) -> dict[str, str]:
    return {digest: placement.preferred(digest, 1)[0] for digest in ADAPTERS}


def test_each_replica_gets_its_share_of_the_adapters() -> None:
    weights = {**FEW, "large": 3.0}
    counts = Counter(firsts(of(weights)).values())
    for name, weight in weights.items():
        assert counts[name] / len(ADAPTERS) == pytest.approx(weight / 13, rel=0.25)


def test_a_replica_that_goes_moves_only_its_adapters() -> None:
    before = firsts(of(FEW))
    after = firsts(of({name: weight for name, weight in FEW.items() if name != "replica-3"}))
    assert all(after[digest] == name for digest, name in before.items() if name != "replica-3")
    assert "replica-3" not in after.values()


def test_a_replica_that_comes_takes_only_its_adapters() -> None:
    before, after = firsts(of(FEW)), firsts(of({**FEW, "new": 1.0}))
    moved = [digest for digest in ADAPTERS if before[digest] != after[digest]]
    assert {after[digest] for digest in moved} == {"new"}
    assert 0.5 / 11 < len(moved) / len(ADAPTERS) < 1.5 / 11


def test_every_process_finds_the_same_replicas() -> None:
    program = (
        "from tpeft_deploy.runtime.cluster.placement import AffinePlacement\n"
        "own = AffinePlacement(); own.update({f'replica-{index}': 1.0 for index in range(10)})\n"
        "print(','.join(own.preferred(f'{index:064x}', 1)[0] for index in range(50)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert other.stdout.strip().split(",") == [of(FEW).preferred(digest, 1)[0] for digest in ADAPTERS[:50]]


def test_more_preferred_replicas_begin_with_the_same_ones() -> None:
    own = of(FEW)
    for digest in ADAPTERS[:50]:
        order = own.preferred(digest, 10)
        assert sorted(order) == sorted(FEW)
        assert [own.preferred(digest, count) for count in range(1, 10)] == [order[:count] for count in range(1, 10)]


def test_an_adapter_in_demand_belongs_to_more_replicas() -> None:
    own = of(FEW, PlacementCosts(filled=0.5))
    for moment in range(100):
        own.demand.add("hot", 21, moment)
        own.demand.add(f"cold-{moment}", 79, moment)
    assert own.demand.share("hot") == pytest.approx(0.21)
    assert (own.copies("hot"), own.copies("cold-99"), own.copies("unknown")) == (5, 1, 1)
    assert own.demand.hottest()[0] == "hot"


def test_demand_is_forgotten_with_time() -> None:
    own = Demand(10.0, 10)
    own.add("a", 8, 0.0)
    own.add("b", 1, 30.0)  # when those of a count an eighth
    assert own.share("a") == pytest.approx(own.share("b"))
    own.add("c", 2, 1e6)  # far beyond what a float can count in one unit
    assert own.share("c") == pytest.approx(1.0)
    assert own.share("a") == pytest.approx(0.0)


def test_demand_of_the_least_wanted_is_forgotten() -> None:
    own = Demand(10.0, 10)
    for index in range(1000):
        own.add(f"cold-{index}", 1, 0.0)
        own.add("hot", 1, 0.0)
    assert len(own.hottest()) <= 20
    assert own.hottest()[0] == "hot"


def test_the_preferred_replica_answers_unless_it_is_far_busier_than_the_mean() -> None:
    own = of(FEW, PlacementCosts(slack=1.25, spare_rows=8))
    first, second = own.preferred("a" * 64, 2)
    assert own.choose("a" * 64, dict.fromkeys(FEW, 0.0), nowhere) == first
    assert own.choose("a" * 64, {**dict.fromkeys(FEW, 1.0), first: 9.0}, nowhere) == first
    assert own.choose("a" * 64, {**dict.fromkeys(FEW, 1.0), first: 50.0}, nowhere) == second
    # Where the adapter is resident, a load is spared.
    load = {**dict.fromkeys(FEW, 1.0), first: 50.0, second: 3.0}
    third = own.preferred("a" * 64, 4)[2]
    assert own.choose("a" * 64, {**load, second: 50.0}, lambda name, _: name == third) == third


def test_no_replica_is_an_error() -> None:
    with pytest.raises(LookupError):
        AffinePlacement().choose("a", {}, nowhere)


@given(
    weights=st.dictionaries(st.text(min_size=1, max_size=5), st.floats(0.1, 10), min_size=1, max_size=20),
    loads=st.lists(st.floats(0, 1000), min_size=20, max_size=20),
    rows=st.lists(st.sampled_from(ADAPTERS[:8]), min_size=1, max_size=30),
    seed=st.integers(0, 2**16),
)
def test_every_row_of_a_request_has_one_replica(
    weights: dict[str, float], loads: list[float], rows: list[str], seed: int
) -> None:
    own = of(weights)
    load = dict(zip(sorted(weights), loads, strict=False))

    def resident(name: str, digest: str) -> bool:
        return hash((sorted(weights).index(name), int(digest, 16), seed)) % 3 == 0

    parts = own.split(rows, load, resident)
    assert sorted(row for part in parts for row in part.rows) == list(range(len(rows)))
    assert {part.replica for part in parts} <= set(weights)
    chosen = own.choose(rows[0], load, resident)
    assert chosen in weights


def test_a_mixed_request_goes_where_most_of_it_is_resident_or_apart() -> None:
    load = dict.fromkeys(FEW, 0.0)
    own = of(FEW, PlacementCosts(miss_rows=4, part_rows=4))
    there = own.preferred(ADAPTERS[0], 1)[0]
    elsewhere = next(digest for digest in ADAPTERS if own.preferred(digest, 1)[0] != there)
    rows = [ADAPTERS[0], elsewhere, ADAPTERS[0]]
    assert own.split(rows, load, lambda name, _: name == there) == [RowsPart(there, (0, 1, 2))]
    apart = of(FEW, PlacementCosts(miss_rows=40, part_rows=4))
    homes = {digest: own.preferred(digest, 1)[0] for digest in (ADAPTERS[0], elsewhere)}
    parts = apart.split(rows, load, lambda name, digest: homes[digest] == name)
    assert parts == [RowsPart(there, (0, 2)), RowsPart(homes[elsewhere], (1,))]


def test_a_new_replica_is_told_what_belongs_to_it() -> None:
    own = of({**FEW, "new": 1.0})
    found = own.belonging("new", ADAPTERS)
    assert found == [digest for digest in ADAPTERS if own.preferred(digest, 1) == ["new"]]
    assert found


def test_a_simulated_cluster_finds_adapters_resident_and_is_balanced() -> None:
    digests, times = scale_simulation.demand(3000, 30_000, 10)
    every = scale_simulation.policies()
    ours = scale_simulation.simulate(every["this toolkit"], digests, times, 10, 90)
    random = scale_simulation.simulate(every["random"], digests, times, 10, 90)
    assert ours.hit_rate > 0.85 * ours.best
    assert ours.hit_rate > 1.5 * random.hit_rate
    assert ours.imbalance < 1.25
    assert ours.wait_99 < 20


def test_the_best_eviction_is_that_of_belady() -> None:
    assert scale_simulation.belady(list("abcabcab"), 2, 0) == 3  # a b hit after c took the place of the farther one
    assert scale_simulation.belady(list("aaaa"), 1, 2) == 2

"""What a process knows of its replicas."""

from __future__ import annotations

from tpeft_deploy.runtime.cluster.affinity import ReplicaTable, short_digest, table_of
from tpeft_deploy.runtime.cluster.wire import Figures

DIGESTS = [f"{number:064x}"[::-1] for number in range(1, 60)]


def _table(*names: str) -> ReplicaTable:
    table = ReplicaTable(clock=lambda: 0.0)
    table.update(dict.fromkeys(names, Figures()))
    return table


def test_two_processes_choose_alike_and_a_replica_that_goes_moves_its_share_alone() -> None:
    names = ["a", "b", "c", "d"]
    first, second = _table(*names), _table(*reversed(names))
    chosen = {digest: first.preferred(digest, 1)[0] for digest in DIGESTS}
    assert chosen == {digest: second.preferred(digest, 1)[0] for digest in DIGESTS}
    first.update(dict.fromkeys(names[:3], None))
    moved = {digest for digest in DIGESTS if first.preferred(digest, 1)[0] != chosen[digest]}
    assert moved == {digest for digest, name in chosen.items() if name == "d"}


def test_load_and_residency_come_from_what_was_sent_and_what_was_reported() -> None:
    table = _table("a", "b")
    digest = DIGESTS[0]
    assert not table.resident(digest)
    with table.running("a", [digest], 10):
        assert table.choose("base", 1) == "b"
    assert table.resident(digest)
    other = DIGESTS[1]
    table.update({"a": Figures(rows=5), "b": Figures(resident=frozenset({short_digest(other)}))})
    assert table.resident(other)
    assert table.choose("base", 1) == "b"
    table.update({"a": None})
    assert not table.resident(other)
    assert table.choose(other, 1) == "a"


def test_an_adapter_that_a_replica_has_evicted_is_not_taken_for_resident() -> None:
    table = _table("a")
    with table.running("a", [DIGESTS[0]], 1):
        pass
    table.update({"a": Figures(rows=1)})  # may have been written before the adapter came
    assert table.resident(DIGESTS[0])
    table.update({"a": Figures(rows=1)})  # the same again
    assert table.resident(DIGESTS[0])
    table.update({"a": Figures(rows=2)})
    assert not table.resident(DIGESTS[0])


def test_a_lost_replica_is_avoided_and_none_is_none() -> None:
    table = _table("a", "b")
    assert table.choose(DIGESTS[0], 1, avoid="a") == "b"
    assert table.choose(DIGESTS[0], 1, avoid="b") == "a"
    assert _table("a").choose(DIGESTS[0], 1, avoid="a") == "a"
    assert _table().choose(DIGESTS[0], 1) is None
    assert _table().preferred(DIGESTS[0]) == []


def test_changes_are_told_once() -> None:
    table, told = ReplicaTable(), []
    table.on_change = lambda: told.append(table.replicas)
    table.update({"a": None})
    table.update({"a": Figures(rows=3)})
    table.update({"b": None})
    assert told == [("a",), ("b",)]


def test_a_deployment_has_one_table() -> None:
    assert table_of("x") is table_of("x")
    assert table_of("x") is not table_of("y")

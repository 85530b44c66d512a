"""Transactions on tasks: each change gives a task another tag, and one whose condition is false changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.server.registry_subjects import adapter, add, unchecked
from tpeft_deploy import Adapter
from tpeft_deploy.errors import Conflict, NotFound, PreconditionFailed
from tpeft_deploy.runtime.server.registry import Condition, State, TaskRecord, VersionRecord, open_state
from tpeft_deploy.runtime.server.tenancy.access import SHARED

Changing = Callable[[State, Condition], object]
NEW = Condition(exists=False)


def register(state: State, condition: Condition) -> VersionRecord:
    return state.tasks.add("acme", "mood", adapter(2), unchecked, by="a key", condition=condition)


CHANGES: dict[str, Changing] = {
    "register": register,
    "point": lambda state, condition: state.tasks.point("acme", "mood", "new", "1", by="a key", condition=condition),
    "rollback": lambda state, condition: state.tasks.rollback(
        "acme", "mood", "current", by="a key", condition=condition
    ),
    "delete a version": lambda state, condition: state.tasks.remove_version(
        "acme", "mood", 1, by="a key", condition=condition
    ),
    "delete": lambda state, condition: state.tasks.remove("acme", "mood", by="a key", condition=condition),
    "publish": lambda state, condition: state.tasks.publish(
        "acme", "mood", lambda _: None, by="a key", condition=condition
    ),
}


@pytest.fixture
def state(tmp_path: Path, url: str | None) -> Iterator[State]:
    with open_state(tmp_path / "state", url) as own:
        yield own


def task(state: State) -> TaskRecord:
    return state.tasks.snapshot().task("acme", "mood")


def blobs(state: State) -> set[str]:
    return {place.stem for place in state.tasks._blobs._files()}  # type: ignore[attr-defined]


def having(*tags: str) -> Condition:
    return Condition(frozenset(tags))


def test_no_tag_comes_back(state: State) -> None:
    tasks, tags = state.tasks, list[str]()
    for seed in (0, 0, 1):
        add(state, seed=seed)
        tags.append(task(state).tag)
    for alias, version in [("current", "1"), ("current", "1"), ("canary", "2")]:  # the second changes nothing
        tags.append(tasks.point("acme", "mood", alias, version, by="a key").tag)
    tags.append(tasks.rollback("acme", "mood", "current", by="a key").tag)
    tags.append(tasks.remove_version("acme", "mood", 1, by="a key")[1].tag)
    tasks.remove("acme", "mood", by="a key")
    add(state)
    tags.append(task(state).tag)
    tags.append(tasks.publish("acme", "mood", lambda _: None, by="a key").tag)
    assert len(set(tags)) == len(tags) == 10
    assert task(state).tag == tags[-1]


def test_another_task_and_a_restart_leave_a_tag(state: State, tmp_path: Path, url: str | None) -> None:
    add(state)
    before = task(state).tag
    add(state, name="other")
    add(state, tenant="rival")
    assert task(state).tag == before
    state.close()
    with open_state(tmp_path / "state", url) as again:
        assert task(again).tag == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_with_the_tag_is_made(state: State, change: str) -> None:
    add(state, seed=0)
    add(state, seed=1)
    tag = task(state).tag
    CHANGES[change](state, having('"none"', tag))
    with pytest.raises((PreconditionFailed, NotFound)):
        CHANGES[change](state, having('"none"', tag))


def test_a_false_condition_changes_nothing(state: State) -> None:
    add(state, seed=0)
    stale = task(state).tag
    add(state, seed=1)
    before, files, log = task(state), blobs(state), state.audit.list()
    for change in CHANGES.values():
        for condition in (having(stale), having(), NEW, Condition(having(before.tag).tags, exists=False)):
            with pytest.raises(PreconditionFailed, match=f"the tag {before.tag}.*Nothing was changed"):
                change(state, condition)
    assert (task(state), blobs(state), state.audit.list()) == (before, files, log)
    assert add(state).number == 3


@pytest.mark.parametrize("deleted", [False, True])
def test_a_task_that_is_absent_has_no_tag(state: State, deleted: bool) -> None:
    if deleted:
        add(state)
        gone = task(state).tag
        state.tasks.remove("acme", "mood", by="a key")
    for change in CHANGES.values():
        for condition in (having(gone if deleted else '"0"'), Condition(exists=True)):
            with pytest.raises(PreconditionFailed, match="got none"):
                change(state, condition)
        if change is not register:
            with pytest.raises(NotFound):
                change(state, NEW)
    assert register(state, NEW).number == 1 + deleted


def test_the_condition_holds_when_the_change_is_made(state: State) -> None:
    """A registration begins while its condition is true; during its check the task is changed."""
    add(state, seed=0)
    before, withdrawn = task(state).tag, list[VersionRecord]()

    def check(_record: VersionRecord, _adapter: Adapter) -> None:
        state.tasks.point("acme", "mood", "canary", "1", by="another key")

    with pytest.raises(PreconditionFailed):
        state.tasks.add(
            "acme", "mood", adapter(1), check, by="a key", condition=having(before), withdraw=withdrawn.append
        )
    assert [record.number for record in withdrawn] == [2]
    assert blobs(state) == {task(state).versions[1].digest}
    assert add(state, seed=2).number == 2


def test_a_shared_task_is_not_the_tenants(state: State) -> None:
    add(state, SHARED)
    with pytest.raises(PreconditionFailed, match="got none"):
        state.tasks.point("acme", "mood", "canary", "1", by="a key", condition=having(task(state).tag))
    with pytest.raises(Conflict, match="shared task"):
        register(state, NEW)

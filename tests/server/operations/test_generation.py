from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served
from tpeft_deploy.errors import Forbidden, InputError, NotFound, ProtocolError
from tpeft_deploy.runtime.server.operations.generation import ContextExceeded, Generations
from tpeft_deploy.runtime.server.tenancy.access import Principal


def test_a_models_name_is_a_task_a_version_the_base_or_a_weighted_set(served: Served) -> None:
    own, who = served.service.generations, served.who("acme", "infer")
    for name in ("base", served.bundle.manifest.name):
        assert own.target(who, name).task is None
    assert own.target(who, "two").task == own.target(who, "two@1").task == "two"
    found = own.target(who, "two:0.5+plain:-1")
    assert found.task == {"two": 0.5, "plain": -1.0}
    assert [version.task for version in found.versions] == ["two", "plain"]
    assert own.target(who, "two:2").task == {"two": 2.0}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nobody", NotFound),
        ("two@7", NotFound),
        ("two:1+nobody:1", NotFound),
        ("two+plain", ProtocolError),
        ("two:x+plain:1", ProtocolError),
        ("two:nan+plain:1", ProtocolError),
        ("two:1+two:2", ProtocolError),
        ("+", ProtocolError),
    ],
)
def test_other_names_are_refused(served: Served, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        served.service.generations.target(served.who("acme", "infer"), name)


def test_a_role_without_inference_is_refused(served: Served) -> None:
    nobody: Any = type("Nobody", (Principal,), {"actions": ()})
    with pytest.raises(Forbidden):
        served.service.generations.target(nobody("acme", served.who().role, "k"), "two")


def test_a_sequence_has_room_for_so_many_tokens(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    own = served.service.generations
    monkeypatch.setattr(Generations, "most_tokens", 10)
    assert own.room([1] * 4, None) == 6
    assert own.room([1] * 4, None, 3) == 3
    assert own.room([1] * 9, None, 16) == 1
    assert own.room([1] * 4, 6) == 6
    with pytest.raises(ContextExceeded):
        own.room([1] * 4, 7)
    with pytest.raises(ContextExceeded):
        own.room([1] * 10, None)
    assert issubclass(ContextExceeded, InputError)

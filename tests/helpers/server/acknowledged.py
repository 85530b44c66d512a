"""Whether a server has what it acknowledged to a `Load`, after some process was killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.server.load import NAMES, OPERATOR, TENANTS, Load, infer
from tpeft_deploy.runtime.server.registry import open_keys


def make_keys(state: Path, url: str | None) -> dict[str, str]:
    keys, database = open_keys(state, url)
    roles = {**dict.fromkeys(TENANTS, "deploy"), OPERATOR: "admin"}
    made = {tenant: keys.create(tenant, role, by="a test")[1] for tenant, role in roles.items()}
    database.close()
    return made


class Log:
    """The audit log after each restart: it says which of the changes that were going on were done.

    Args:
        load: who made them.
        keys: how many there were before.
    """

    def __init__(self, load: Load, keys: int = len(TENANTS) + 1) -> None:
        self._load = load
        self._first = keys
        self._keys: dict[str, str] = {}  # id -> the last action on it
        self.figures = {"killed and done": 0, "killed and not done": 0}

    def settle(self) -> None:
        """Hold every entry since the last time against what was acknowledged: no other, in this order, once."""
        with self._load.client(OPERATOR) as http:
            entries = http.get("/v2/admin/audit", params={"limit": 1000}).json()
            listed = {key["id"]: key["revoked"] is not None for key in http.get("/v2/admin/keys").json()}
        new = [entry for entry in reversed(entries) if entry["id"] > self._load.settled]
        assert len(new) < 1000, "more than one page of the log"
        self._load.settled = max((entry["id"] for entry in new), default=self._load.settled)
        self._tasks([entry for entry in new if "key" not in entry["action"]])
        self._settle_keys([entry for entry in new if "key" in entry["action"] and entry["key"] != "a test"])
        made = {own: action == "revoke key" for own, action in self._keys.items()}
        assert {own: revoked for own, revoked in listed.items() if own in made} == made
        assert len(listed) == len(made) + self._first, "a key that nobody made"

    def _tasks(self, entries: list[Mapping[str, Any]]) -> None:
        for (tenant, name), history in self._load.histories.items():
            found = [(e["action"], e["detail"]) for e in entries if (e["tenant"], e["target"]) == (tenant, name)]
            pending = [] if history.pending is None else [history.pending[1]]
            assert found in (history.log, [*history.log, *pending]), f"{tenant}, {name}"
            done = len(found) > len(history.log)
            if pending:
                self.figures["killed and done" if done else "killed and not done"] += 1
            history.settle(done=done)
        assert {(e["tenant"], e["target"]) for e in entries} <= set(self._load.histories)

    def _settle_keys(self, entries: list[Mapping[str, Any]]) -> None:
        load = self._load
        found = [(entry["action"], entry["target"]) for entry in entries]
        assert found[: len(load.key_log)] == load.key_log
        unacknowledged = found[len(load.key_log) :]
        if unacknowledged:
            assert load.pending_key is not None
            assert len(unacknowledged) == 1
            action, own = unacknowledged[0]
            assert (action, own if load.pending_key[1] else "") == load.pending_key
            if action == "revoke key":
                load.secrets.pop(own)
        if load.pending_key is not None:
            self.figures["killed and done" if unacknowledged else "killed and not done"] += 1
        self._keys |= {own: action for action, own in found}
        load.key_log.clear()
        load.pending_key = None


def everything_is_as_acknowledged(load: Load) -> set[str]:
    """Digests of all versions, after: tasks are as they were left, versions have their outputs, keys work."""
    digests: set[str] = set()
    for tenant in TENANTS:
        known = {name: load.histories[tenant, name].now for name in NAMES}
        with load.client(tenant) as http:
            tasks = {task["name"]: task for task in http.get("/v2/registry/tasks").json()}
            assert set(tasks) == {*load.expected.shared, load.bundle, *(n for n in NAMES if known[n].versions)}
            rows: list[tuple[str, str]] = []
            for name, task in known.items():
                if task.versions:
                    assert load.shown(tasks[name]) == (task.versions, task.aliases)
                rows += [(f"{name}@{number}", digest) for number, digest in task.versions.items()]
                rows += [(f"{name}@{alias}", task.versions[number]) for alias, number in task.aliases.items()]
                digests |= set(task.versions.values())
            rows.append(("base", "base"))
            status, found, logits, _ = infer(http, load.bundle, [*(name for name, _ in rows), "base"])
            assert status == 200
            assert list(found) == [*(digest for _, digest in rows), "base"]
            load.expected.check(found, logits)
    with load.client(OPERATOR) as http:
        for key in load.secrets.values():
            assert load.known(http, key)
    return digests

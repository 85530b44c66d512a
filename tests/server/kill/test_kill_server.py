"""SIGKILL of a server under load: what was acknowledged is there, nothing is half, no answer is by a wrong adapter."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import nets
from tests.helpers.server.load import NAMES, OPERATOR, TENANTS, Expected, Load, digest_of, infer
from tests.helpers.server.processes import begin, server
from tests.server.conftest import PIXELS
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime.server.registry import open_keys


@pytest.fixture(scope="module")
def uploads() -> dict[str, bytes]:
    """Digest -> file, of adapters that the bundle does not have."""
    module = nets.conv_net()[0]
    targets = {"up.weight": (4, 4), "stem.weight": (2, 1, 2, 2)}
    made = [nets.adapter_for(module, targets, seed=10 * n) for n in range(5)]
    return {digest_of(adapter.to_bytes()): adapter.to_bytes() for adapter in made}


@pytest.fixture(scope="module")
def expected(conv_bundle: Bundle, uploads: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Expected:
    shared = {"base": "base", **conv_bundle.tasks}
    place = tmp_path_factory.mktemp("uploads")
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
        outputs = {digest: runtime.run({"pixels": PIXELS}, task=task)["logits"] for task, digest in shared.items()}
        for digest, data in uploads.items():
            file = place / f"{digest}.safetensors"
            file.write_bytes(data)
            runtime.load(digest, file)
            outputs[digest] = runtime.run({"pixels": PIXELS}, task=digest)["logits"]
    return Expected(outputs, shared)


LONG = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("kills", "url"),
    [(3, "sqlite"), pytest.param(50, "sqlite", marks=LONG), pytest.param(25, "postgresql", marks=LONG)],
    indirect=["url"],
)
def test_a_server_killed_under_load_loses_nothing_and_never_answers_by_a_wrong_adapter(
    conv_bundle: Bundle,
    uploads: dict[str, bytes],
    expected: Expected,
    tmp_path: Path,
    kills: int,
    url: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tmp_path / "state"
    if url is not None:
        monkeypatch.setenv("TPEFT_DATABASE_URL", url)
    load = Load(make_keys(state, url), uploads, expected, conv_bundle.manifest.name)
    options = [conv_bundle.path, "--state", state, "--port", 0, "--threads", 1, "--no-access-log"]
    log = Log(load)
    for seed in range(kills):
        choice = random.Random(seed)
        if seed % 4 == 1:
            kill_while_it_starts(options, choice)
        with server(*options) as (process, load.url):
            log.settle()
            load.judge()
            everything_is_as_acknowledged(load, state)
            load.over.clear()
            with ThreadPoolExecutor() as pool:
                clients = [pool.submit(client) for client in load.clients(seed)]
                load.wait(choice.randint(6, 12), choice.randint(11, 30))
                time.sleep(choice.uniform(0, 0.1))  # at any moment of what goes on
                load.over.set()
                process.kill()
                process.wait(100)
            for client in clients:
                client.result(200)
    with server(*options) as (process, load.url):
        log.settle()
        everything_is_as_acknowledged(load, state)
        process.terminate()
        assert process.wait(100) == 0
    figures = {"changes": load.changes, "answers": load.answers, "not found": load.missing, **log.figures}
    print(f"{kills} kills: {figures}")  # pytest -rP shows it
    assert load.changes > 5 * kills
    assert load.answers > 10 * kills


def make_keys(state: Path, url: str | None) -> dict[str, str]:
    keys, database = open_keys(state, url)
    roles = {**dict.fromkeys(TENANTS, "deploy"), OPERATOR: "admin"}
    made = {tenant: keys.create(tenant, role, by="a test")[1] for tenant, role in roles.items()}
    database.close()
    return made


def kill_while_it_starts(options: list[object], choice: random.Random) -> None:
    process = begin(*options)
    try:
        time.sleep(choice.uniform(0.2, 1.5))
    finally:
        process.kill()
        process.communicate(timeout=100)


class Log:
    """The audit log after each restart: it says which of the changes that were going on were done.

    Args:
        load: who made them.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._last = 0
        self._keys: dict[str, str] = {}  # id -> the last action on it
        self.figures = {"killed and done": 0, "killed and not done": 0}

    def settle(self) -> None:
        """Hold every entry since the last time against what was acknowledged: no other, in this order, once."""
        with self._load.client(OPERATOR) as http:
            entries = http.get("/v2/admin/audit", params={"limit": 1000}).json()
            listed = {key["id"]: key["revoked"] is not None for key in http.get("/v2/admin/keys").json()}
        new = [entry for entry in reversed(entries) if entry["id"] > self._last]
        assert len(new) < 1000, "more than one page of the log"
        self._last = max((entry["id"] for entry in new), default=self._last)
        self._tasks([entry for entry in new if "key" not in entry["action"]])
        self._settle_keys([entry for entry in new if "key" in entry["action"] and entry["key"] != "a test"])
        made = {own: action == "revoke key" for own, action in self._keys.items()}
        assert {own: revoked for own, revoked in listed.items() if own in made} == made
        assert len(listed) == len(made) + len(TENANTS) + 1, "a key that nobody made"

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


def everything_is_as_acknowledged(load: Load, state: Path) -> None:
    """Tasks as they were left, each version with its own outputs, keys that work, and no file beside them."""
    digests = set()
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
    assert {file.name for file in (state / "blobs").glob("*/*")} == {f"{digest}.safetensors" for digest in digests}
    assert not list((state / "incoming").iterdir())


def test_the_model_of_a_task_knows_what_is_refused() -> None:
    """The tests above trust it."""
    from tests.helpers.server.load import Change, Task, applied

    task = Task()
    assert applied(task, Change("delete")) is None
    assert applied(task, Change("roll back")) is None
    for digest in ("a", "b"):
        found = applied(task, Change("register", digest=digest))
        assert found is not None
        task = found[0]
    assert (task.digest(""), task.digest("1"), task.digest("3"), task.digest("canary")) == ("b", "a", None, None)
    back = applied(task, Change("roll back"))
    assert back is not None
    assert back[0].digest("") == "a"
    assert applied(task, Change("delete version", number=2)) is None
    assert applied(back[0], Change("delete version", number=2)) is not None


def test_histories_say_what_a_request_may_have_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.server.load import Change, History

    moments = iter(range(1, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(moments)))
    history = History()
    assert history.begin(Change("register", digest="a"))  # at 1
    history.acknowledged()  # at 2
    assert history.begin(Change("register", digest="b"))  # at 3, and never acknowledged

    def seen(since: float, until: float) -> list[str | None]:
        return [task.digest("") for task in history.during(since, until)]

    assert seen(0, 0.5) == [None]
    assert seen(0.5, 1.5) == [None, "a"]
    assert seen(2.1, 2.9) == ["a"]
    assert seen(2.1, 3.5) == ["a", "b"]
    assert seen(8, 9) == ["a", "b"]

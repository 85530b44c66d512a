"""Tenants that change a server and ask it, and what it may have answered them at every moment."""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS
from tpeft_deploy import Bundle, Runtime

TENANTS = ("acme", "rival")  # both have tasks of the same names
NAMES = ("mood", "tone")
OPERATOR = "operator"
ALIASES = ("current", "canary")
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Task:
    """A task as it should be: its digests by version, what aliases stand for now and before, the last number given."""

    versions: Mapping[int, str] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    previous: Mapping[str, int] = field(default_factory=dict)
    last: int = 0

    def digest(self, version: str) -> str | None:
        """Of a version as requests name it, or None."""
        number = self.aliases.get(version or "current") if not version.isdigit() else int(version)
        return None if number is None else self.versions.get(number)

    def number(self, version: str) -> int | None:
        return int(version) if version.isdigit() else self.aliases.get(version or "current")


@dataclass(frozen=True)
class Change:
    """What somebody asks for; `action` as the audit log calls it."""

    action: str
    alias: str = "current"
    number: int = 0
    digest: str = ""


def applied(task: Task, change: Change) -> tuple[Task, dict[str, object]] | None:
    """The task after a change, and the details in the log; None where it has to be refused."""
    alias, number = change.alias, change.number
    if change.action == "register":
        number = task.last + 1
        task = Task({**task.versions, number: change.digest}, task.aliases, task.previous, number)
        return pointed(task, alias, number), {"version": number, "digest": change.digest, "alias": alias}
    if change.action == "delete":
        if not task.versions:
            return None
        return Task(last=task.last), {"versions": sorted(task.versions)}
    if change.action == "delete version":
        if number not in task.versions or number in task.aliases.values():
            return None
        versions = {other: digest for other, digest in task.versions.items() if other != number}
        return Task(versions, task.aliases, task.previous, task.last), {"version": number}
    if change.action == "roll back":
        number = task.previous.get(alias, 0)
    if number not in task.versions:
        return None
    return pointed(task, alias, number), {"alias": alias, "version": number}


def pointed(task: Task, alias: str, number: int) -> Task:
    old = task.aliases.get(alias)
    previous = dict(task.previous) if old in {None, number} else {**task.previous, alias: old}
    return Task(task.versions, {**task.aliases, alias: number}, previous, task.last)


@dataclass
class Step:
    """A state of a task, and the time from which it may, and that from which it must, be what is seen."""

    task: Task
    begun: float
    ended: float = math.inf


class History:
    """What a task was, one change after another, and what of it the log has to say."""

    def __init__(self) -> None:
        self.steps = [Step(Task(), -math.inf, -math.inf)]
        self.log: list[tuple[str, dict[str, object]]] = []
        self.pending: tuple[Task, tuple[str, dict[str, object]]] | None = None

    @property
    def now(self) -> Task:
        return self.steps[-1].task

    def begin(self, change: Change) -> bool:
        """Whether it has to be done, and not refused."""
        found = applied(self.now, change)
        if found is None:
            return False
        self.pending = found[0], (change.action, found[1])
        self.steps.append(Step(found[0], time.monotonic()))
        return True

    def acknowledged(self) -> Task:
        assert self.pending is not None
        self.steps[-1].ended = time.monotonic()
        self.log.append(self.pending[1])
        self.pending = None
        return self.now

    def withdraw(self) -> None:
        """Take back what was begun: it was not done, or nobody knows yet."""
        self.steps.pop()
        self.pending = None

    def settle(self, *, done: bool) -> None:
        """After a restart: what was going on was done, or was not, and then nobody may have seen it."""
        if self.pending is not None and not done:
            self.steps.pop()
        self.pending = None
        self.log.clear()

    def forget(self) -> None:
        """All but the present."""
        self.steps = [Step(self.now, -math.inf, -math.inf)]

    def during(self, since: float, until: float) -> list[Task]:
        """What it may have been at some moment of a request."""
        following = [*(step.ended for step in self.steps[1:]), math.inf]
        return [
            step.task
            for step, replaced in zip(self.steps, following, strict=True)
            if step.begun <= until and replaced >= since
        ]


@dataclass(frozen=True)
class Seen:
    """An answer: to which names, between which times, by which digests, with which version; no digests: none found."""

    tenant: str
    names: Sequence[str]
    since: float
    until: float
    digests: Sequence[str]
    version: str = ""


class Expected:
    """What every adapter answers, computed beside the server.

    Args:
        outputs: digest -> logits of `PIXELS`, row by row.
        shared: the bundle's tasks -> digest.
    """

    def __init__(self, outputs: Mapping[str, Array], shared: Mapping[str, str]) -> None:
        self._outputs = outputs
        self.shared = shared
        for one, logits in outputs.items():
            for other, others in outputs.items():
                if one != other and logits.shape == others.shape:
                    assert np.abs(logits - others).max(1).min() > 2e-3, "adapters that cannot be told apart"

    @classmethod
    def of(cls, bundle: Bundle, uploads: Mapping[str, bytes], place: Path) -> Expected:
        """Run the bundle's tasks and uploaded adapters, digest -> file, which are written to a directory."""
        shared = {"base": "base", **bundle.tasks}
        with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
            outputs = {digest: runtime.run({"pixels": PIXELS}, task=task)["logits"] for task, digest in shared.items()}
            for digest, data in uploads.items():
                file = place / f"{digest}.safetensors"
                file.write_bytes(data)
                runtime.load(digest, file)
                outputs[digest] = runtime.run({"pixels": PIXELS}, task=digest)["logits"]
        return cls(outputs, shared)

    def check(self, digests: Sequence[str], rows: Sequence[Array]) -> None:
        """Whether rows of `PIXELS`, from the first on and over again, have these adapters' outputs."""
        assert len(digests) == len(rows)
        for row, (digest, found) in enumerate(zip(digests, rows, strict=True)):
            wanted = self._outputs[digest][row % len(PIXELS)]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=f"row {row}, digest {digest}")


def infer(http: httpx.Client, bundle: str, names: Sequence[str]) -> tuple[int, Sequence[str], list[Array], str]:
    """Status, digests of the rows, their logits, version; one name is asked for by itself, several as rows of one."""
    alone = len(names) == 1
    name, _, version = names[0].partition("@")
    count = len(PIXELS) if alone else len(names)
    pixels = PIXELS[np.arange(count) % len(PIXELS)]
    inputs = [{"name": "pixels", "shape": pixels.shape, "datatype": "FP32", "data": pixels.ravel().tolist()}]
    if not alone:
        inputs.append({"name": "adapter", "shape": [count], "datatype": "BYTES", "data": list(names)})
    model = (name if not version else f"{name}/versions/{version}") if alone else bundle
    answer = http.post(f"/v2/models/{model}/infer", json={"inputs": inputs})
    if answer.status_code != 200:
        return answer.status_code, [], [], answer.text[:500]
    document = answer.json()
    digests = document["parameters"]["adapter_digest"].split(",") * (count if alone else 1)
    found = {one["name"]: np.reshape(one["data"], one["shape"]) for one in document["outputs"]}
    rows = list(found["logits"]) if "logits" in found else [found[f"logits.{row}"] for row in range(count)]
    return 200, digests, [np.asarray(row, np.float32) for row in rows], document.get("model_version", "")


class Load:
    """Clients of one server, each in a thread of its own, until `stop`.

    Args:
        keys: tenant -> key.
        uploads: digest -> the file of an adapter.
        expected: their answers.
        bundle: its name.
    """

    def __init__(self, keys: Mapping[str, str], uploads: Mapping[str, bytes], expected: Expected, bundle: str) -> None:
        self.keys = keys
        self.uploads = uploads
        self.expected = expected
        self.bundle = bundle
        self.histories = {(tenant, name): History() for tenant in TENANTS for name in NAMES}
        self.key_log: list[tuple[str, str]] = []
        self.pending_key: tuple[str, str] | None = None  # an empty id: of a key that is made
        self.secrets: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.changes = self.answers = self.missing = 0
        self.settled = 0  # the last entry of the audit log that was held against what was acknowledged
        self.over = threading.Event()
        self.url = ""

    def client(self, tenant: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=100)

    def clients(self, seed: int) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = [lambda: self._until_over(self._change_keys, OPERATOR, seed)]
        for number, tenant in enumerate(TENANTS):
            for work in (self._change_tasks, self._ask):
                own = 10 * seed + number
                found.append(lambda work=work, tenant=tenant, own=own: self._until_over(work, tenant, own))  # type: ignore[misc]
        return found

    def wait(self, changes: int, answers: int) -> None:
        """Return once so many more changes were acknowledged and requests answered."""
        goal = self.changes + changes, answers + sum(bool(seen.digests) for seen in self.seen)
        wait_until(lambda: self.changes >= goal[0] and sum(bool(s.digests) for s in self.seen) >= goal[1], "the load")

    def _until_over(self, work: Callable[[httpx.Client, str, random.Random], None], tenant: str, seed: int) -> None:
        choice = random.Random(f"{work.__name__} {seed}")
        with self.client(tenant) as http:
            try:
                while True:
                    work(http, tenant, choice)
            except httpx.TransportError:
                assert self.over.wait(100), "the server ended a connection by itself"

    def _change_tasks(self, http: httpx.Client, tenant: str, choice: random.Random) -> None:
        name = choice.choice(NAMES)
        history = self.histories[tenant, name]
        change = self._pick(history.now, choice)
        wanted = history.begin(change)
        answer = self._send(http, f"/v2/registry/tasks/{name}", change)
        if not wanted:
            assert answer.status_code in {404, 409}, answer.text
            return
        assert answer.status_code == 200, answer.text
        task = history.acknowledged()
        self.changes += 1
        if not change.action.startswith("delete"):
            shown = self.shown(answer.json())
            assert shown == (task.versions, task.aliases), f"{change}: {shown}, not {task}"

    @staticmethod
    def shown(document: Mapping[str, Any]) -> tuple[dict[int, str], dict[str, int]]:
        """Versions and aliases of a task as the server describes it."""
        versions = {int(one["version"]): str(one["digest"]) for one in document["versions"]}
        return versions, {alias: int(number) for alias, number in document["aliases"].items()}

    def _pick(self, task: Task, choice: random.Random) -> Change:
        actions = 5 * ["register"] + 3 * ["point", "roll back", "delete version"] + ["delete"]
        number = choice.choice([*task.versions, task.last + 1])
        return Change(choice.choice(actions), choice.choice(ALIASES), number, choice.choice(list(self.uploads)))

    def _send(
        self, http: httpx.Client, path: str, change: Change, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        alias = f"{path}/aliases/{change.alias}"
        if change.action == "register":
            files = {"weights": self.uploads[change.digest]}
            return http.post(f"{path}/versions", params={"alias": change.alias}, files=files, headers=headers)
        if change.action == "point":
            return http.put(alias, json={"version": change.number}, headers=headers)
        if change.action == "roll back":
            return http.post(f"{alias}/rollback", headers=headers)
        gone = path if change.action == "delete" else f"{path}/versions/{change.number}"
        return http.delete(gone, headers=headers)

    def _change_keys(self, http: httpx.Client, _: str, choice: random.Random) -> None:
        if len(self.secrets) < 3 or choice.random() < 0.5:
            self.pending_key = "create key", ""
            answer = http.post("/v2/admin/keys", json={"tenant": choice.choice(TENANTS), "role": "infer"})
            assert answer.status_code == 200, answer.text
            own, key = answer.json()["id"], answer.json()["key"]
            self.secrets[own] = key
            self._key_acknowledged("create key", own)
            assert self.known(http, key)
        else:
            own = choice.choice(list(self.secrets))
            self.pending_key = "revoke key", own
            assert http.delete(f"/v2/admin/keys/{own}").status_code == 200
            key = self.secrets.pop(own)
            self._key_acknowledged("revoke key", own)
            assert not self.known(http, key)

    def _key_acknowledged(self, action: str, own: str) -> None:
        self.key_log.append((action, own))
        self.pending_key = None
        self.changes += 1

    @staticmethod
    def known(http: httpx.Client, key: str) -> bool:
        """Whether the server takes a key."""
        status = http.get("/v2", headers={"Authorization": f"Bearer {key}"}).status_code
        assert status in {200, 401}
        return status == 200

    def _ask(self, http: httpx.Client, tenant: str, choice: random.Random) -> None:
        names = []
        for _ in range(choice.choice([1, 1, 2, 5])):
            name = choice.choice([*NAMES, *NAMES, *self.expected.shared])
            version = (
                choice.choice(["", "", "@canary", f"@{self.histories[tenant, name].now.last}"])
                if (name in NAMES)
                else ""
            )
            names.append(name + version)
        since = time.monotonic()
        status, digests, rows, version = infer(http, self.bundle, names)
        assert status in {200, 404}, f"{names}: {status} {version}"
        if status == 200:
            self.expected.check(digests, rows)
        self.seen.append(Seen(tenant, names, since, time.monotonic(), digests, version))

    def judge(self) -> None:
        """Whether each answer was by a version that its tenant's name stood for while it was asked.

        After a restart, so that a version which is not there was seen by nobody.
        """
        for seen in self.seen:
            known = [self._known(seen, name) for name in seen.names]
            if not seen.digests:
                assert any(None in one for one in known), f"not found: {seen}"
                self.missing += 1
                continue
            digests = seen.digests[:1] if len(seen.names) == 1 else seen.digests
            for digest, own in zip(digests, known, strict=True):
                assert digest in {one[0] for one in own if one is not None}, f"{seen}: {own}"
            if len(seen.names) == 1:
                assert (digests[0], seen.version) in known[0], f"{seen}: {known}"
            assert len(set(zip(seen.names, digests, strict=True))) == len(set(seen.names)), f"two by one name: {seen}"
            self.answers += 1
        self.seen.clear()
        for history in self.histories.values():
            history.forget()

    def _known(self, seen: Seen, asked: str) -> set[tuple[str, str] | None]:
        """Digest and version that a name stood for at some moment of a request; None: there was none."""
        name, _, version = asked.partition("@")
        if name in self.expected.shared:
            return {(self.expected.shared[name], "1")}
        found: set[tuple[str, str] | None] = set()
        for task in self.histories[seen.tenant, name].during(seen.since, seen.until):
            digest = task.digest(version)
            found.add(None if digest is None else (digest, str(task.number(version))))
        return found


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""A `Load` of a cluster of which parts are killed: 503 with Retry-After is no answer, and never a wrong one."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import httpx

from tests.helpers.server.load import NAMES, OPERATOR, TENANTS, Change, Expected, Load, Step, Task, applied
from tests.helpers.waiting import SECONDS, wait_until

_ASKING = 2  # threads of each tenant


class NotNow(Exception):
    """A request was refused with 503 and Retry-After, or its connection was cut."""


REFUSED = (NotNow, httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass
class KnownTag:
    """A task as its one client last saw it, and the changes on this state of which nobody knows whether they are done.

    All of them have the same condition.  So at most one is done, and none once another change was.

    Attributes:
        tag: entity tag; None: there is no task.
        doubtful: changes without an acknowledgement, each with the time at which it was sent.
        made_in_doubt: whether the first version of a task was ever doubtful.  A late copy of that request would find
            its condition true again after the task was deleted, so that it never is.
        gaps: whether a registration that was not done may have taken a version number.
    """

    tag: str | None = None
    doubtful: list[tuple[Change, float]] = field(default_factory=list)
    made_in_doubt: bool = False
    gaps: bool = False

    def condition(self) -> dict[str, str]:
        return {"If-None-Match": "*"} if self.tag is None else {"If-Match": self.tag}

    def doubt(self, change: Change, begun: float) -> None:
        self.doubtful.append((change, begun))
        self.made_in_doubt |= self.tag is None
        self.gaps |= change.action == "register"

    def now(self, tag: str | None) -> None:
        """Another change was done: the doubtful ones never will be."""
        self.tag = tag
        self.doubtful.clear()

    def registered(self, before: Task, change: Change, number: int) -> tuple[Task, tuple[str, dict[str, object]]]:
        """The task after a registration that got a number, and what the log says; the next one, if none may be lost."""
        assert number > before.last if self.gaps else number == before.last + 1, f"version {number} after {before}"
        found = applied(replace(before, last=number - 1), change)
        assert found is not None
        return found[0], (change.action, found[1])

    def made(self, before: Task, change: Change, entry: tuple[str, dict[str, object]]) -> Task | None:
        """The task after a change, if an entry of the log is of that."""
        if change.action != entry[0]:
            return None
        if change.action == "register":
            found = self.registered(before, change, int(str(entry[1]["version"])))
            return found[0] if found[1] == entry else None
        other = applied(before, change)
        return None if other is None or other[1] != entry[1] else other[0]


class ClusterLoad(Load):
    """Clients that go on after a request that may be sent again; one that times out or gets another error fails.

    A change without an acknowledgement may be done much later, by a process that still has it.  Therefore each change
    has the tag of its task as a condition, and whether it was done is known once another one of that task is answered.

    Args:
        keys: tenant -> key.
        uploads: digest -> the file of an adapter.
        expected: their answers.
        bundle: its name.

    Attributes:
        refused: requests without an answer, by reason.
        unclear: changes without an acknowledgement, by what was found to have become of them.
    """

    def __init__(self, keys: Mapping[str, str], uploads: Mapping[str, bytes], expected: Expected, bundle: str) -> None:
        super().__init__(keys, uploads, expected, bundle)
        self._known_tags = {place: KnownTag() for place in self.histories}
        self.refused: Counter[str] = Counter()
        self.unclear: Counter[str] = Counter()
        self._answered: dict[str, float] = {}  # client -> when its last request with an answer began
        self._guard = threading.Lock()

    def client(self, tenant: str) -> httpx.Client:
        """A client that raises `NotNow` for 503 with Retry-After."""
        own = super().client(tenant)
        own.timeout = 2 * SECONDS  # Ray's proxy holds requests until there is an ingress again
        own.event_hooks = {"response": [self._may_wait]}
        return own

    def clients(self, seed: int) -> list[Callable[[], None]]:
        """One that changes tasks, and some that ask, for each tenant; seeded."""
        found: list[Callable[[], None]] = []
        for tenant in TENANTS:
            for number, work in enumerate([self._change_tasks, *[self._ask] * _ASKING]):
                found.append(lambda work=work, tenant=tenant, own=10 * seed + number: self._go_on(work, tenant, own))  # type: ignore[misc]
        self._answered.clear()
        return found

    def wait(self, changes: int, answers: int) -> None:
        """Return once so many more changes were acknowledged and requests answered, or a client failed."""
        goal = self.changes + changes, len(self.seen) + answers
        wait_until(
            lambda: self.over.is_set() or (self.changes >= goal[0] and len(self.seen) >= goal[1]),
            "the load",
        )

    def recovered(self, since: float) -> float:
        """Wait until each client was answered a request that it began after a moment; return the seconds from it."""
        count = len(TENANTS) * (1 + _ASKING)

        def done() -> bool:  # or a client failed, which its result says
            return self.over.is_set() or sum(begun > since for begun in list(self._answered.values())) == count

        wait_until(done, "the recovery")
        return time.monotonic() - since

    def _go_on(self, work: Callable[[httpx.Client, str, random.Random], None], tenant: str, seed: int) -> None:
        choice = random.Random(f"{work.__name__} {tenant} {seed}")
        with self.client(tenant) as http:
            while not self.over.is_set():
                began = time.monotonic()
                try:
                    work(http, tenant, choice)
                except REFUSED as error:
                    with self._guard:
                        self.refused[str(error) if isinstance(error, NotNow) else type(error).__name__] += 1
                    self.over.wait(0.05)
                except BaseException:
                    self.over.set()
                    raise
                else:
                    self._answered[f"{tenant} {work.__name__} {seed}"] = began
            if work == self._change_tasks:
                self.settle_doubts(http, tenant)

    def _change_tasks(self, http: httpx.Client, tenant: str, choice: random.Random) -> None:
        name = choice.choice(NAMES)
        change = self._pick(self.histories[tenant, name].now, choice)
        if change.action == "delete" and self._known_tags[tenant, name].made_in_doubt:
            change = replace(change, action="register")
        self._change(http, tenant, name, change)

    def settle_doubts(self, http: httpx.Client, tenant: str) -> None:
        """Change each task that has doubtful changes, until none of them can be done any more."""

        def tried(name: str) -> bool:
            now = self.histories[tenant, name].now
            alias = next(iter(now.aliases), "current")
            own = Change("point", alias, now.aliases[alias]) if now.aliases else Change("register", alias)
            try:
                self._change(http, tenant, name, replace(own, digest=next(iter(self.uploads))))
            except REFUSED:
                return False
            return not self._known_tags[tenant, name].doubtful

        for name in NAMES:
            if self._known_tags[tenant, name].doubtful:
                wait_until(lambda name=name: tried(name), "the end of doubtful changes")  # type: ignore[misc]

    def _change(self, http: httpx.Client, tenant: str, name: str, change: Change) -> None:
        """Ask for a change of the task as it was last seen; 412 if an earlier, doubtful one was done meanwhile."""
        history, known = self.histories[tenant, name], self._known_tags[tenant, name]
        before = history.now
        wanted = history.begin(change)
        begun = history.steps[-1].begun
        try:
            answer = self._send(http, f"/v2/registry/tasks/{name}", change, known.condition())
        except REFUSED:
            if wanted:
                history.withdraw()
                known.doubt(change, begun)
                self._settle(http, tenant, name, "done")
            raise
        if answer.status_code == 412:
            if wanted:  # a proxy may have sent it twice, and the first was done
                history.withdraw()
                known.doubt(change, begun)
            assert self._settle(http, tenant, name, "done later"), f"{change}: {answer.text}"
            return
        if not wanted:
            assert answer.status_code in {404, 409}, answer.text
            return
        assert answer.status_code == 200, answer.text
        if change.action == "register":
            given = max(int(one["version"]) for one in answer.json()["versions"])
            history.pending = known.registered(before, change, given)
            history.steps[-1].task = history.pending[0]
        task = history.acknowledged()
        self.changes += 1
        if not change.action.startswith("delete"):
            shown = self.shown(answer.json())
            assert shown == (task.versions, task.aliases), f"{change}: {shown}, not {task}"
        known.now(answer.headers["etag"] if task.versions else None)

    def _settle(self, http: httpx.Client, tenant: str, name: str, how: str) -> bool:
        """Ask the log which of the doubtful changes of a task was done; whether one was, of which there is only one."""
        history, known = self.histories[tenant, name], self._known_tags[tenant, name]
        found = self._logged(tenant, name)
        assert found[: len(history.log)] == history.log, f"{tenant}, {name}"
        new = found[len(history.log) :]
        if not new:
            self._count("not done yet")
            return False
        assert len(new) == 1, f"{tenant}, {name}: {new}"
        own = [(known.made(history.now, change, new[0]), begun) for change, begun in known.doubtful]
        task, begun = next((task, begun) for task, begun in own if task is not None)
        history.steps.append(Step(task, begun))
        history.pending = task, new[0]
        tag = self._seen(http, name, task, known.tag)
        history.acknowledged()
        known.now(tag)
        self._count(how)
        return True

    def _logged(self, tenant: str, name: str) -> list[tuple[str, dict[str, object]]]:
        """Changes of a task in the audit log since it was last held against what was acknowledged."""
        found: list[httpx.Response] = []
        with self.client(OPERATOR) as operator:

            def read() -> bool:
                answer = self._get(operator, "/v2/admin/audit?limit=1000")
                found.extend([] if answer is None else [answer])
                return answer is not None

            wait_until(read, "the audit log")
        return [
            (entry["action"], entry["detail"])
            for entry in reversed(found[0].json())
            if entry["id"] > self.settled and (entry["tenant"], entry["target"]) == (tenant, name)
        ]

    def _seen(self, http: httpx.Client, name: str, task: Task, before: str | None) -> str | None:
        """Wait until a task is seen after a change, and return its tag."""
        tags: list[str | None] = []

        def seen() -> bool:
            answer = self._get(http, f"/v2/registry/tasks/{name}")
            if answer is None:
                return False
            if answer.status_code == 404:
                tags.append(None)
                return not task.versions
            tags.append(answer.headers["etag"])
            return tags[-1] != before and self.shown(answer.json()) == (task.versions, task.aliases)

        wait_until(seen, "the sight of a change")
        return tags[-1]

    def _count(self, what: str) -> None:
        with self._guard:
            self.unclear[what] += 1

    @staticmethod
    def _get(http: httpx.Client, path: str) -> httpx.Response | None:
        try:
            return http.get(path)
        except REFUSED:
            return None

    @staticmethod
    def _may_wait(answer: httpx.Response) -> None:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            answer.read()
            raise NotNow(answer.text[:200])

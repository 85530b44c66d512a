"""A `Load` of a cluster of which parts are killed: 503 with Retry-After is no answer, and never a wrong one."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import httpx
import psycopg

from tests.helpers.server.load import NAMES, OPERATOR, TENANTS, Expected, Load
from tests.helpers.waiting import wait_until

_ASKING = 2  # threads of each tenant


class NotNow(Exception):
    """A request was refused with 503 and Retry-After, or its connection was cut."""


REFUSED = (NotNow, httpx.NetworkError, httpx.RemoteProtocolError)


class ClusterLoad(Load):
    """Clients that go on after a request that may be sent again; one that times out or gets another error fails.

    Args:
        keys: tenant -> key.
        uploads: digest -> the file of an adapter.
        expected: their answers.
        bundle: its name.
        database: URL of the registry's PostgreSQL.

    Attributes:
        refused: requests without an answer, by reason.
        unclear: changes without an acknowledgement, by what became of them.
    """

    def __init__(
        self, keys: Mapping[str, str], uploads: Mapping[str, bytes], expected: Expected, bundle: str, database: str
    ) -> None:
        super().__init__(keys, uploads, expected, bundle)
        self._database = database.replace("+psycopg", "")
        self.refused: Counter[str] = Counter()
        self.unclear: Counter[str] = Counter()
        self._answered: dict[str, float] = {}  # client -> when its last request with an answer began
        self._guard = threading.Lock()

    def client(self, tenant: str) -> httpx.Client:
        """A client that raises `NotNow` for 503 with Retry-After."""
        own = super().client(tenant)
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

    def _change_tasks(self, http: httpx.Client, tenant: str, choice: random.Random) -> None:
        try:
            super()._change_tasks(http, tenant, choice)
        except REFUSED:
            for name in NAMES:
                if self.histories[tenant, name].pending is not None:
                    self._settle(http, tenant, name)
            raise

    def _settle(self, http: httpx.Client, tenant: str, name: str) -> None:
        """Ask the log what became of a change without an acknowledgement."""
        history = self.histories[tenant, name]
        assert history.pending is not None
        task, change = history.pending
        with self.client(OPERATOR) as operator:
            wait_until(lambda: self._get(operator, "/v2/admin/audit") is not None, "the audit log")
            entries = operator.get("/v2/admin/audit", params={"limit": 1000}).json()
        found = [
            (entry["action"], entry["detail"])
            for entry in reversed(entries)
            if entry["id"] > self.settled and (entry["tenant"], entry["target"]) == (tenant, name)
        ]
        assert found in (history.log, [*history.log, change]), f"{tenant}, {name}"
        done = len(found) > len(history.log)
        with self._guard:
            self.unclear["done" if done else "not done"] += 1
        if not done:
            history.steps.pop()
            history.pending = None
            # A registration that was not done may have taken a number, which no other gets.
            history.steps[-1].task = replace(history.now, last=self._last_number(tenant, name))
            return

        def seen() -> bool:
            answer = self._get(http, f"/v2/registry/tasks/{name}")
            if answer is None:
                return False
            if answer.status_code == 404:
                return not task.versions
            return self.shown(answer.json()) == (task.versions, task.aliases)

        wait_until(seen, "the sight of a change")
        history.acknowledged()

    def _last_number(self, tenant: str, name: str) -> int:
        with psycopg.connect(self._database) as connection:
            query = "SELECT next_number - 1 FROM tasks WHERE tenant = %s AND name = %s"
            found = connection.execute(query, (tenant, name)).fetchone()
        return 0 if found is None else int(found[0])

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

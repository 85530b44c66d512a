"""Incident 6, of the table in test_incidents.py: what answers is what the tenant's name stands for, at any moment."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import httpx
import numpy as np
import pytest

from tests.helpers.server.answers import Answer, Tally, alike, base_logits, client_of, meanwhile, over_grpc, post
from tests.helpers.server.audited import Audited
from tests.helpers.server.incidents import digest_of
from tests.helpers.server.merged import close, merged
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter


@pytest.fixture(scope="module")
def many() -> list[Adapter]:
    return alike(4)


def clients(
    server: Audited, tenant: str, model: str, over: threading.Event, tally: Tally
) -> list[Callable[[], list[Answer]]]:
    """What asks for a model until it is over: three over HTTP, two over gRPC."""

    def http_() -> list[Answer]:
        with client_of(server, tenant) as client:
            found = []
            while not over.is_set():
                found.append(tally.add(post(client, model, PIXELS)))
            return found

    def grpc_() -> list[Answer]:
        found = []
        while not over.is_set():
            found.append(tally.add(over_grpc(server, tenant, model)))
        return found

    return [http_, http_, http_, grpc_, grpc_]


class History:
    """What a name stood for, and when a change began and ended; None is nothing."""

    def __init__(self, first: str | None) -> None:
        self._steps: list[tuple[float, float, str | None]] = [(-math.inf, -math.inf, first)]

    def change(self, what: str | None, do: Callable[[], httpx.Response]) -> httpx.Response:
        began = time.monotonic()
        answer = do()
        assert answer.status_code == 200, answer.text
        self._steps.append((began, time.monotonic(), what))
        return answer

    def could_be(self, answer: Answer, what: str | None) -> bool:
        """Whether the name stood for it at some moment between a request and its answer."""
        ends = [end for _, end, _ in self._steps[1:]] + [math.inf]
        return any(
            own == what and began <= answer.received and answer.sent <= until
            for (began, _, own), until in zip(self._steps, ends, strict=True)
        )


def check(answers: Sequence[Answer], history: History, versions: dict[str, Adapter]) -> None:
    """Each answer is whole, of one version, and of one that was current meanwhile."""
    expected = {digest_of(adapter): merged(adapter) for adapter in versions.values()}
    for answer in answers:
        if answer.status == 404:
            assert history.could_be(answer, None)
            continue
        assert answer.status == 200
        assert answer.logits is not None
        assert answer.digest == digest_of(versions[answer.version])
        assert history.could_be(answer, answer.version), answer.version
        close(answer.logits, expected[answer.digest])


def test_incident_6_swaps_under_load(server: Audited, many: list[Adapter]) -> None:
    versions = {str(number): adapter for number, adapter in enumerate(many[:3], 1)}
    expected = {digest_of(adapter): merged(adapter) for adapter in versions.values()}
    for adapter in versions.values():
        assert server.register(adapter, "swapped").status_code == 200
    history, over, tally, mixes = History("3"), threading.Event(), Tally(), Tally()
    path = "/v2/registry/tasks/swapped/aliases/current"
    jobs = clients(server, "acme", "swapped", over, tally)
    jobs.append(partial(mix, server, over, mixes))
    with meanwhile(over, jobs) as asking:
        for step in range(45):
            number = str(1 + step % 3)
            history.change(number, partial(server.ask, "PUT", path, json={"version": number}))
            if step % 9 == 8:
                history.change(str(1 + (step - 1) % 3), partial(server.ask, "POST", f"{path}/rollback"))
            tally.wait(len(jobs))  # so that one of the clients at least has asked since
        mixes.wait(11)
    *lists, mixed = (one.result() for one in asking)
    answers = [answer for own in lists for answer in own]
    check(answers, history, versions)
    assert len(answers) > 100
    assert {answer.version for answer in answers} == set(versions)
    base = base_logits()
    for answer in mixed:
        first, none, same, fixed = answer.digest.split(",")
        assert (first, none, fixed) == (same, "base", digest_of(many[0])), "one name is one version within a request"
        assert any(digest_of(one) == first and history.could_be(answer, number) for number, one in versions.items())
        assert answer.logits is not None
        rows = [expected[first][0], base[1], expected[same][2], expected[fixed][3]]
        close(answer.logits, np.stack(rows))
    assert len(mixed) > 10
    assert server.ask("DELETE", "/v2/registry/tasks/swapped").status_code == 200


def mix(server: Audited, over: threading.Event, tally: Tally) -> list[Answer]:
    found = []
    with client_of(server, "acme") as client:
        while not over.is_set():
            found.append(tally.add(post(client, "conv", PIXELS, ["swapped", "base", "swapped", "swapped@1"])))
    assert {answer.status for answer in found} == {200}
    return found


def test_incident_6_a_name_that_is_deleted_and_registered_again(server: Audited, many: list[Adapter]) -> None:
    versions: dict[str, Adapter] = {}
    history, over, tally = History(None), threading.Event(), Tally()
    with meanwhile(over, clients(server, "acme", "again", over, tally)) as asking:
        for number in range(1, 16):
            adapter = many[number % 3]
            versions[str(number)] = adapter
            answer = history.change(str(number), partial(server.register, adapter, "again"))
            assert [one["version"] for one in answer.json()["versions"]] == [str(number)], "numbers are not given again"
            tally.wait(2)
            history.change(None, partial(server.ask, "DELETE", "/v2/registry/tasks/again"))
            tally.wait(2, 404)
    answers = [answer for one in asking for answer in one.result()]
    check(answers, history, versions)
    seen = Counter(answer.status for answer in answers)
    assert min(seen[200], seen[404]) > 20, seen


def test_incident_6_two_tenants_with_the_same_name_and_the_same_request(server: Audited, many: list[Adapter]) -> None:
    over = threading.Event()
    own = {"acme": many[0], "rival": many[-1]}
    for tenant, adapter in own.items():
        assert server.register(adapter, "same", tenant).status_code == 200
    tallies = {tenant: Tally() for tenant in own}
    jobs = [job for tenant in own for job in clients(server, tenant, "same", over, tallies[tenant])]
    with meanwhile(over, jobs) as asking:
        for tally in tallies.values():
            tally.wait(100)
    answers = [[answer for one in asking[start : start + 5] for answer in one.result()] for start in (0, 5)]
    for (tenant, adapter), found in zip(own.items(), answers, strict=True):
        expected = merged(adapter)
        assert len(found) > 20, tenant
        for answer in found:
            assert (answer.status, answer.digest, answer.version) == (200, digest_of(adapter), "1")
            assert answer.logits is not None
            close(answer.logits, expected)

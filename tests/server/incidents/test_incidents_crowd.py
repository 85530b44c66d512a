"""Incidents 8 and 9, of the table in test_incidents.py: many at once, on a device with room for few."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import httpx
import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.server.answers import alike, base_logits, client_of, document, meanwhile, post
from tests.helpers.server.audited import Audited, audited
from tests.helpers.server.merged import close, merged
from tests.helpers.server.v2_bodies import framed
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle
from tpeft_deploy.tucker import Array

ROOM = 3  # adapters on the device
FLOOD = 24  # requests of one tenant that are always under way


@pytest.fixture(scope="module")
def many() -> list[Adapter]:
    return alike(2 * ROOM + 2)


@pytest.fixture(scope="module")
def server(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, many: list[Adapter]) -> Iterator[Audited]:
    with Runtime(conv_bundle.path, provider="cpu", threads=1, preload=False) as runtime:
        runtime.load("one", many[0])
        used = runtime.usage()
    room = (ROOM + 1) * used["device_bytes"] // (used["rows"] + 1)
    place = tmp_path_factory.mktemp("crowd")
    with audited(conv_bundle, place, device_bytes=room, max_queue_rows=20_000, max_rows=8) as found:
        for number, adapter in enumerate(many):
            assert found.register(adapter, f"cold-{number}").status_code == 200
        assert found.register(many[-1], "mood", "rival").status_code == 200
        yield found
        found.check_conduct()
        assert found.memory() < 1 << 30


class Mixed:
    """Requests of all kinds on all adapters, and what is to come of each."""

    def __init__(self, many: Sequence[Adapter]) -> None:
        self.names = [f"cold-{number}" for number in range(len(many))]
        self.expected = {name: merged(adapter) for name, adapter in zip(self.names, many, strict=True)}
        self.expected["base"] = base_logits()

    def bad(self, kind: str, client: httpx.Client, choice: random.Random) -> None:
        """A request that is refused."""
        rows, names = PIXELS[:2], choice.choices(self.names, k=2)
        if kind == "unknown":
            names[-1] = choice.choice(["none", "mood@9", "rival/mood", "", "a" * 200])
            assert post(client, "conv", rows, names).status == 404
        elif kind == "shape":
            shapes = [rows[:, :, :-1], rows[:, 0], rows[:, :, :, None], rows.reshape(-1, 1, 14, 12), rows[:0]]
            assert post(client, "conv", np.ascontiguousarray(choice.choice(shapes)), names).status == 400
        else:
            assert post(client, "conv", rows, names[:1] * 3).status == 400

    def spoilt(self, client: httpx.Client, choice: random.Random) -> None:
        """One whose rows are answered but for one that holds no numbers."""
        names, rows, row = choice.choices([*self.names[:ROOM], "base"], k=4), PIXELS.copy(), choice.randrange(4)
        rows[row] = choice.choice([np.nan, np.inf])
        answer = post(client, "conv", rows, names)
        assert answer.logits is not None
        assert not np.isfinite(answer.logits[row]).all()
        for other in {0, 1, 2, 3} - {row}:
            close(answer.logits[other], self.expected[names[other]][other])

    def good(self, client: httpx.Client, choice: random.Random, adapters: int) -> None:
        """One that is answered; where its adapters do not fit at once, one after the other."""
        known, images = choice.sample([*self.names, "base"], adapters), choice.choices(range(4), k=8)
        names = [*known, *choice.choices(known, k=8 - adapters)]
        answer = post(client, "conv", PIXELS[images], names)
        assert answer.logits is not None, answer
        close(answer.logits, np.stack([self.expected[name][n] for name, n in zip(names, images, strict=True)]))


@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_incident_8_a_bad_request_fails_alone(server: Audited, many: list[Adapter], count: int) -> None:
    """Of more adapters than there is room for, among requests with unknown names, wrong shapes, and no numbers."""
    mixed = Mixed(many)

    def some(seed: int) -> Counter[str]:
        choice, seen = random.Random(seed), Counter[str]()
        with client_of(server, "acme") as client:
            for _ in range(count):
                kind = choice.choice(["good", "good", "good", "more", "spoilt", "unknown", "shape", "names"])
                seen[kind] += 1
                if kind in {"good", "more"}:
                    mixed.good(client, choice, ROOM if kind == "good" else 2 * ROOM)
                elif kind == "spoilt":
                    mixed.spoilt(client, choice)
                else:
                    mixed.bad(kind, client, choice)
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = sum(pool.map(some, range(8)), Counter[str]())
    assert len(seen) == 6
    assert min(seen.values()) > 5
    assert server.process.poll() is None
    assert "Traceback" not in server.log(), "nothing of this is unexpected"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """A server of a model that looks rows up: what is beyond its table fails while it runs."""
    module, inputs = nets.text_net()
    place = tmp_path_factory.mktemp("text")
    adapter = nets.adapter_for(module, {"mix.weight": (2, 2)}, seed=1)
    bundle = export_bundle(module, {"words": adapter}, place / "bundle", example_inputs=inputs)
    with audited(bundle, place, max_delay="20ms", max_rows=16) as found:
        yield found


def test_incident_8_a_row_that_fails_in_the_model_fails_alone(text: Audited) -> None:
    good = np.random.default_rng(0).integers(0, 20, (6, 2, 5))
    bad = np.repeat(good[:1], 4, axis=0)
    bad[:, 1, 2] = 20, -21, 1 << 40, -(1 << 62)

    def ask(ids: Array) -> httpx.Response:
        one = {"name": "ids", "shape": list(ids.shape), "datatype": "INT64", "data": ids.ravel().tolist()}
        return text.ask("POST", "/v2/models/words/infer", role="infer", json={"inputs": [one]})

    alone = [ask(ids).json() for ids in good]
    with ThreadPoolExecutor(10) as pool:
        for _ in range(6):
            *answers, _, _, _, _ = asked = list(pool.map(ask, (*good, *bad)))
            assert [one.status_code for one in asked] == [200] * 6 + [400] * 4
            for answer, expected in zip(answers, alone, strict=True):
                found = answer.json()
                (output,), (wanted,) = found.pop("outputs"), expected["outputs"]
                np.testing.assert_allclose(output.pop("data"), wanted["data"], rtol=1e-4, atol=1e-6)
                assert found | {"outputs": [output | {"data": wanted["data"]}]} == expected
    assert text.process.poll() is None


def flood(server: Audited, models: Sequence[str], rows: int, over: threading.Event, first: int) -> set[int]:
    """Ask again as soon as there is an answer; with which statuses."""
    pixels = np.resize(PIXELS, (rows, 1, 12, 14))
    own = framed(document(pixels), pixels.tobytes())
    headers = own["headers"] | server.headers("acme", "infer")
    seen = set()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)) as client:
        for turn in itertools.count(first):
            if over.is_set():
                break
            client.request("POST", f"/v2/models/{models[turn % len(models)]}/infer", own["content"], headers)
            answer = client.getresponse()
            answer.read()
            seen.add(answer.status)
    return seen


def beside_a_flood(server: Audited, models: Sequence[str], rows: int, expected: Array) -> list[int]:
    """How many of a flood's requests were answered while each of another tenant's was under way."""
    begin = len(server.log())
    over = threading.Event()
    with meanwhile(over, [partial(flood, server, models, rows, over, first) for first in range(FLOOD)]) as flooding:
        logged(server, begin, "acme", 2 * FLOOD)  # it is under way
        with client_of(server, "rival") as client:
            for _ in range(15):
                answer = post(client, "mood", PIXELS)
                assert answer.status == 200
                assert answer.logits is not None
                close(answer.logits, expected)
    assert {status for one in flooding for status in one.result()} == {200}
    own, theirs = logged(server, begin, "rival", 15), logged(server, begin, "acme", 15)
    return [sum(end - ms / 1000 <= other <= end for other, _ in theirs) for end, ms in own]


def logged(server: Audited, begin: int, tenant: str, least: int) -> list[tuple[float, float]]:
    """When the server answered a tenant, and in how many milliseconds; its log is written behind the answers."""
    until = time.monotonic() + 120
    while True:
        lines = [json.loads(line) for line in server.log()[begin:].split("\n")[:-1] if line.startswith('{"time"')]
        found = [(line["time"], line["ms"]) for line in lines if line["tenant"] == tenant]
        if len(found) >= least:
            return found
        assert time.monotonic() < until
        time.sleep(0.05)


def test_incident_9_a_flood_delays_nobody_else(server: Audited, many: list[Adapter]) -> None:
    counts = beside_a_flood(server, ["cold-0"], 64, merged(many[-1]))
    assert statistics.median(counts) <= FLOOD / 4, counts
    assert max(counts) <= FLOOD, counts


@pytest.mark.parametrize("adapters", [ROOM, 2 * ROOM + 2])
def test_incident_9_a_flood_that_fills_the_device_delays_nobody_else(
    server: Audited, many: list[Adapter], adapters: int
) -> None:
    """Neither by adapters that take each other's rows, nor by such as are never without a request."""
    models = [f"cold-{number}" for number in range(adapters)]
    counts = beside_a_flood(server, models, 4, merged(many[-1]))
    # What is in use already is waited for, and no more: that would be thousands.
    assert statistics.median(counts) <= 2 * FLOOD, counts
    assert max(counts) <= 8 * FLOOD, counts

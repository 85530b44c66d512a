"""Room for bytes is taken before they are read and given back however a request ends; what is large leaves the loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import gzip
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import PIXELS, Served
from tpeft_deploy import Adapter
from tpeft_deploy.errors import QuotaExceeded, TooLarge, Unavailable
from tpeft_deploy.runtime.server.rest.app import Application, application
from tpeft_deploy.runtime.server.rest.transport import compression
from tpeft_deploy.runtime.server.tenancy.intake import ByteBudget, Intake, budget_of_bodies
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.limits import RestLimits

MIB = 1 << 20
INFER = "/v2/models/base/infer"
LOAD = "/v2/repository/models/mood/load"
UPLOAD = "/v2/registry/tasks/mood/versions"


class Gone(Exception):
    """The transport was lost."""


@dataclass
class Called:
    """What came of a call, and how often it asked for a part of its body."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    received: int = 0


@dataclass
class Front:
    """An application on a service, its budgets, and a key."""

    app: Application
    intake: Intake
    served: Served
    key: str

    async def call(
        self,
        path: str,
        parts: Sequence[bytes] = (),
        headers: dict[str, str] | None = None,
        *,
        leaves: bool = False,
        lost: bool = False,
        key: str | None = None,
    ) -> Called:
        """POST a body.

        Args:
            path: of the route.
            parts: of the body, as they come.
            headers: beside the key.
            leaves: the client goes away after its parts.
            lost: the answer cannot be sent.
            key: another than the own.
        """
        found = Called()
        own = {"authorization": f"Bearer {key or self.key}"} | (headers or {})
        left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if not leaves:
            left.append({"type": "http.request", "body": b"", "more_body": False})

        async def receive() -> Any:
            await asyncio.sleep(0)
            found.received += 1
            if left:
                return left.pop(0)
            if leaves:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            await asyncio.sleep(0)
            if lost:
                raise Gone
            found.status = message.get("status", found.status)
            found.headers |= dict(message.get("headers", ()))
            found.body += message.get("body", b"")

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "root_path": ""}
        raw = [(name.encode(), value.encode()) for name, value in own.items()]
        with contextlib.suppress(Gone):
            await self.app({**scope, "headers": raw}, receive, send)
        return found

    def ask(self, *args: Any, **options: Any) -> Called:
        return asyncio.run(self.call(*args, **options))

    @property
    def held(self) -> tuple[int, ...]:
        budgets = (self.intake.memory, self.intake.staging)
        return tuple(n for one in budgets for n in (one.used, one.used_by("acme"), len(one._of)))


@pytest.fixture
def front(served: Served) -> Iterator[Front]:
    intake = Intake(ByteBudget(8 * MIB, 6 * MIB), ByteBudget(4 * MIB, 3 * MIB))
    limits = RestLimits(body_bytes=4 * MIB, json_bytes=MIB, upload_bytes=2 * MIB, json_upload_bytes=MIB)
    _, key = served.state.keys.create("acme", "deploy", by="a test")
    own = Front(application(served.service, limits, None, intake), intake, served, key)
    yield own
    assert own.held == (0,) * 6


def raw(pixels: np.ndarray[Any, Any] = PIXELS) -> tuple[bytes, dict[str, str]]:
    data = pixels.tobytes()
    tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape)}
    text = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}]}).encode()
    return text + data, {"inference-header-content-length": str(len(text))}


def text(rows: int = 4) -> bytes:
    pixels = np.resize(PIXELS, (rows, *PIXELS.shape[1:]))
    tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def form(weights: bytes) -> tuple[bytes, dict[str, str]]:
    head = b'--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    return head + weights + b"\r\n--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}


# -- the budget


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 90), st.booleans()), max_size=40))
def test_a_budget_is_never_overdrawn_and_comes_back(steps: list[tuple[str, int, bool]]) -> None:
    own = ByteBudget(100, 60)
    holds = {tenant: own.hold(tenant) for tenant in "abc"}
    for tenant, size, give in steps:
        hold = holds[tenant]
        before = hold.size, own.used
        wanted = min(size, hold.size) if give else size
        fits = wanted <= 60 and own.used - hold.size + wanted <= 100
        with contextlib.nullcontext() if fits else pytest.raises(Unavailable if wanted <= 60 else TooLarge):
            hold.resize(wanted)
        assert fits or (hold.size, own.used) == before  # nothing at all
        assert own.used == sum(one.size for one in holds.values()) <= 100
        assert own.used_by(tenant) == hold.size <= 60
    for hold in holds.values():
        hold.close()
        hold.close()
    assert own.used == 0
    assert not own._of


def test_refusals_say_what_to_do() -> None:
    own = ByteBudget(100)
    own.hold("a").take(50)
    with pytest.raises(QuotaExceeded, match="at most 50 bytes in flight for a tenant") as caught:
        own.hold("a").take(1)
    assert caught.value.retry_after
    with pytest.raises(TooLarge):
        own.hold("b").take(51)
    own.hold("b").take(50)
    with pytest.raises(Unavailable, match="as many bytes in flight as it may") as full:
        own.hold("c").take(1)
    assert "50" not in str(full.value)  # nothing of others
    assert budget_of_bodies(64 * MIB).total == 1 << 30
    assert budget_of_bodies(256 * MIB).total == 1 << 32


# -- before anything is read


def test_what_is_refused_is_not_read(front: Front) -> None:
    body, headers = raw()
    sized = {**headers, "content-length": str(len(body))}
    assert front.ask(INFER, [body], sized).status == 200
    assert front.ask(INFER, [body], sized, key="no key").status == 401
    over = {**headers, "content-length": str(4 * MIB + 1)}
    head = {"inference-header-content-length": str(MIB + 1), "content-length": str(2 * MIB)}
    huge = {"content-length": "9" * 4000}
    unread = [(INFER, over), (INFER, {"content-length": str(MIB + 1)}), (INFER, head), (INFER, huge)]
    unread += [(UPLOAD, {"content-length": str(4 * MIB)}), (LOAD, {"content-length": str(MIB + 1)})]
    unread += [("/v2/repository/index", {"content-length": str(RestLimits().document_bytes + 1)})]
    for path, own in unread:
        found = front.ask(path, [body], own)
        assert (found.status, found.received) == (413, 0), (path, own)
    for tenant, size, status in (("acme", "4096", 429), ("rival", str(3 * MIB), 503)):
        with front.intake.memory.hold(tenant) as used:
            used.take(6 * MIB)
            found = front.ask(INFER, [body], {**headers, "content-length": size})
            assert (found.status, found.received) == (status, 0)
            assert int(found.headers[b"retry-after"]) >= 1
            found = front.ask(LOAD, [body], {"content-length": "9" if tenant == "acme" else str(MIB)})
            assert found.received == (0 if tenant == "acme" else 2)
    with front.intake.staging.hold("acme") as used:
        used.take(3 * MIB)
        found = front.ask(UPLOAD, [body], {"content-length": "10"})
        assert (found.status, found.received) == (429, 0)


def test_the_quota_is_asked_before_a_body_and_stays_spent(front: Front) -> None:
    front.served.state.tenants.put("acme", Quota(requests_per_s=2), by="a test")
    body, headers = raw()
    assert front.ask(INFER, [b"no JSON"]).status == 400
    assert front.ask("/v2/models/none/infer", [body], headers).status == 404
    found = front.ask(INFER, [body], headers)
    assert (found.status, found.received) == (429, 0)
    assert found.headers[b"retry-after"] == b"1"


def test_large_bodies_wait_for_those_that_were_refused(front: Front) -> None:
    sized = {"content-length": str(len(text(200)))}
    assert front.ask("/v2/models/none/infer", [text(200)], sized).status == 404
    assert set(front.intake.refused._until) == {"acme"}
    assert front.ask(INFER, [text(200)], sized).status == 200
    front.intake.refused.charge("acme", 1 << 36)
    for own in (sized, {}):  # without a length it may be any
        found = front.ask(INFER, [text(200)], own)
        assert (found.status, found.received) == (429, 0)
    _, other = front.served.state.keys.create("rival", "infer", by="a test")
    assert front.ask("/v2/models/none/infer", [text(200)], sized, key=other).status == 404
    body, headers = raw()
    assert front.ask(INFER, [body], {**headers, "content-length": str(len(body))}).status == 200


# -- however it ends


FIELD = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--b--\r\n'
GZIP = {"content-encoding": "gzip"}
REQUESTS: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "raw": (INFER, *raw()),
    "json": (INFER, text(200), {}),
    "gzip": (INFER, gzip.compress(text(200)), GZIP),
    "bomb": (INFER, gzip.compress(bytes(9 * MIB)), GZIP),
    "malformed": (INFER, text(200)[:-9] + b"," * 9, {}),
    "cut": (INFER, gzip.compress(text(200))[:-9], GZIP),
    "over": (INFER, bytes(MIB + 1), {}),
    "load": (LOAD, json.dumps({"parameters": {"file:x.safetensors": "AAAA" * 100_000}}).encode(), {}),
    "bad load": (LOAD, json.dumps({"parameters": {"file:x.safetensors": "A=A=" * 100_000}}).encode(), {}),
    "upload": (UPLOAD, bytes(MIB), {}),
    "form": (UPLOAD, *form(bytes(MIB))),
    "field": (UPLOAD, FIELD, form(b"")[1]),
}
ENDS = st.sampled_from(["whole", "leaves", "lost", "cancelled"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(sorted(REQUESTS)), ENDS, st.booleans(), st.integers(0, 30)),
        min_size=1,
        max_size=4,
    )
)
def test_budgets_are_empty_after_every_end(front: Front, calls: list[tuple[str, str, bool, int]]) -> None:
    async def one(kind: str, end: str, sized: bool, steps: int) -> None:
        path, body, headers = REQUESTS[kind]
        if sized:
            headers = {**headers, "content-length": str(len(body))}
        parts = [body[at : at + 65536] for at in range(0, len(body), 65536)]
        if end == "leaves":
            parts = parts[: steps % (len(parts) + 1)]
        call = front.call(path, parts, headers, leaves=end == "leaves", lost=end == "lost")
        task = asyncio.create_task(call)
        if end == "cancelled":
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(found, Called):
            assert found.status in {0, 200, 400, 409, 413, 429, 503}, (kind, end, found)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(*call) for call in calls))

    asyncio.run(all_of_them())
    assert front.held == (0,) * 6


# -- large things


def test_a_bomb_is_refused_for_what_comes_out_of_it(front: Front) -> None:
    bomb, headers = gzip.compress(bytes(64 * MIB)), {"content-encoding": "gzip"}
    assert len(bomb) < 65536
    tracemalloc.start()
    try:
        for rows in (headers, {**headers, "inference-header-content-length": "9"}):
            found = front.ask(INFER, [bomb], rows)
            assert found.status == 413
        with front.intake.memory.hold("acme") as used:
            used.take(5 * MIB)
            assert front.ask(INFER, [bomb], {**headers, "inference-header-content-length": "9"}).status == 429
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
    finally:
        tracemalloc.stop()


def test_large_bodies_are_unpacked_and_read_in_other_threads(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[str]] = {"step": set(), "read": set()}
    own_step, own_read = compression._Stream.step, front.app._infer._heads.__class__.read_in_pieces

    def step(self: Any, size: int) -> bytes:
        thread = threading.current_thread().name.rpartition("_")[0] or "loop"
        threads["step"].add(thread)
        assert size <= (65536 if thread == "loop" else MIB)
        return own_step(self, size)

    def read(self: Any, model: str, given: Any) -> Any:
        threads["read"].add(threading.current_thread().name.rpartition("_")[0] or "loop")
        return own_read(self, model, given)

    monkeypatch.setattr(compression._Stream, "step", step)
    monkeypatch.setattr(front.app._infer._heads.__class__, "read_in_pieces", read)
    large = text(300)
    assert len(large) > 1 << 18
    assert front.ask(INFER, [large]).status == 200
    assert threads == {"step": set(), "read": {"tpeft-bytes"}}
    assert front.ask(INFER, [gzip.compress(large)], {"content-encoding": "gzip"}).status == 200
    assert threads == {"step": {"loop", "tpeft-bytes"}, "read": {"tpeft-bytes"}}
    threads["step"].clear()
    assert front.ask(INFER, [gzip.compress(text())], {"content-encoding": "gzip"}).status == 200
    assert threads["step"] == {"loop"}  # what is small stays where it is


def test_a_large_answer_is_the_same_in_json_in_raw_and_compressed(front: Front) -> None:
    wide = np.random.default_rng(0).standard_normal((900, 1, 12, 14)).astype(np.float32)
    body, headers = raw(wide)
    json_answer = front.ask(INFER, [body], headers)
    asked = json.loads(body[: int(headers["inference-header-content-length"])])
    asked["parameters"] = {"binary_data_output": True}
    head = json.dumps(asked).encode()
    data = head + wide.tobytes()
    own = {"inference-header-content-length": str(len(head))}
    raw_answer = front.ask(INFER, [data], own)
    squeezed = front.ask(INFER, [data], {**own, "accept-encoding": "gzip"})
    assert squeezed.headers[b"content-encoding"] == b"gzip"
    assert gzip.decompress(squeezed.body) == raw_answer.body
    length = int(raw_answer.headers[b"inference-header-content-length"])
    outputs = json.loads(raw_answer.body[:length])["outputs"]
    at = length
    for output, plain in zip(outputs, json.loads(json_answer.body)["outputs"], strict=True):
        size = output["parameters"]["binary_data_size"]
        if output["datatype"] == "FP32":
            values = np.frombuffer(raw_answer.body, np.float32, size // 4, at)
            assert np.allclose(values, plain["data"], atol=1e-5)
        at += size
    assert at == len(raw_answer.body) == int(raw_answer.headers[b"content-length"])


def test_what_was_refused_is_gone_at_once(front: Front) -> None:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        front.ask(INFER, [b"{}"])
        before = tracemalloc.get_traced_memory()[0]
        for body in (bytes(MIB), b'{"inputs":[' + b"1," * 400_000, gzip.compress(bytes(MIB))):
            for headers in ({}, {"content-encoding": "gzip"}, {"inference-header-content-length": "9"}):
                assert front.ask(INFER, [body], headers).status in {400, 413}
        for _ in range(1000):  # the thread that read it may be about to let it go
            if tracemalloc.get_traced_memory()[0] - before < MIB // 2:
                break
            time.sleep(0.01)
        assert tracemalloc.get_traced_memory()[0] - before < MIB // 2
    finally:
        tracemalloc.stop()
        gc.enable()


# -- uploads


def test_forms_go_to_the_staged_files_as_they_come(front: Front, others: list[Adapter]) -> None:
    data = others[0].to_bytes()
    body, headers = form(data)
    pieces = [body[at : at + 97] for at in range(0, len(body), 97)]
    found = front.ask(UPLOAD, pieces, headers)
    assert found.status == 200, found.body
    assert front.ask(UPLOAD, [data]).status == 200  # as a body
    for wrong in (body[:-9], b"--c" + body, body.replace(b"filename", b"other")):
        assert front.ask(UPLOAD, [wrong], headers).status == 400
    many = b"".join(form(b"x")[0].replace(b"--b--\r\n", b"") for _ in range(9)) + b"--b--\r\n"
    assert front.ask(UPLOAD, [many], headers).status == 400


def test_a_load_call_keeps_one_copy_of_its_files(front: Front, others: list[Adapter]) -> None:
    data = others[0].to_bytes()
    coded = base64.b64encode(data).decode()
    padded = {"parameters": {"file:a.safetensors": coded, "pin": False}}
    assert front.ask(LOAD, [json.dumps(padded).encode()]).status == 200
    large = base64.b64encode(bytes(600_000)).decode()
    files = json.dumps({"parameters": {"file:a.safetensors": large}}).encode()
    tracemalloc.start()
    try:
        found = front.ask(LOAD, [files])
        assert found.status == 400  # no adapter
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert b"base64" not in found.body
    escaped = files.replace(b"AAAA", b"AA\\/A")
    assert b"base64" not in front.ask(LOAD, [escaped]).body
    assert b"base64" in front.ask(LOAD, [files.replace(b"AAAA" * 9, b"AAAA" * 8 + b"AA==")]).body

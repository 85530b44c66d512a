"""`tpeft-deploy serve` and `keys` in processes of their own, as one starts them."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from sqlalchemy import insert

from tests.server.conftest import PIXELS
from tests.server.processes import command, server
from tpeft_deploy import Adapter, Bundle, Client, Runtime
from tpeft_deploy.runtime.server.access import LOCAL
from tpeft_deploy.runtime.server.registry import database, open_state


def test_a_key_a_request_and_a_drain(conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]) -> None:
    state = tmp_path / "state"
    with server(conv_bundle.path, "--state", state, "--port", 0, "--threads", 1) as (process, url):
        made = command("keys", "create", "--state", state, "--tenant", "acme", "--role", "deploy", "--json")
        document = json.loads(made.stdout)
        assert set(document) == {"id", "tenant", "role", "key"}
        assert not made.stderr
        until = time.monotonic() + 5
        while httpx.get(f"{url}/v2", headers={"Authorization": f"Bearer {document['key']}"}).status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        with Client(url, document["key"]) as client:
            file = tmp_path / "mood.safetensors"
            file.write_bytes(others[0].to_bytes())
            client.register("mood", file)
            with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
                runtime.load("mood", others[0])
                tasks = ["mood", "base", "two", "partial"]
                expected = runtime.run({"pixels": PIXELS}, tasks=tasks)["logits"]
                got = client.infer({"pixels": PIXELS}, tasks=tasks)["logits"]
                for one, other in zip(got, expected, strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert command("keys", "revoke", "--state", state, document["id"]).returncode == 0
        until = time.monotonic() + 3
        while httpx.get(f"{url}/v2", headers={"Authorization": f"Bearer {document['key']}"}).status_code != 401:
            assert time.monotonic() < until, "a revoked key still works"
            time.sleep(0.1)

        in_use = command("serve", conv_bundle.path, "--state", state, "--port", 0)
        assert in_use.returncode == 1
        assert "another server" in in_use.stderr.splitlines()[-1] or "no other server" in in_use.stderr.splitlines()[-1]
        taken = command("serve", conv_bundle.path, "--state", tmp_path / "other", "--port", url.rpartition(":")[2])
        assert taken.returncode == 1
        assert taken.stderr.count("\n") == 1

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    again = command("keys", "list", "--state", state, "--json")
    (listed,) = json.loads(again.stdout)["keys"]
    assert listed["revoked"] is not None
    assert document["key"] not in again.stdout


def test_it_starts_as_fast_with_many_registered_adapters(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]
) -> None:
    """Nothing is read of them; the limit is many times what listing them takes, as others use the machine."""
    took: dict[int, float] = {}
    for count in (10, 2000):
        _register(tmp_path / str(count), count, others[0])
    for _ in range(2):
        for count in (10, 2000):
            options = ["--state", tmp_path / str(count), "--port", 0, "--no-auth", "--threads", 1, "--no-access-log"]
            began = time.monotonic()
            with server(conv_bundle.path, *options) as (_process, url), Client(url) as client:
                took[count] = min(took.get(count, 60.0), time.monotonic() - began)
                assert sum(task["name"].startswith("task-") for task in client.tasks()) == count
                client.infer({"pixels": PIXELS}, "mood")
    assert took[2000] < took[10] + 1.0


def _register(place: Path, count: int, adapter: Adapter) -> None:
    """One task that answers, and many as `Tasks.add` leaves them, without a transaction and a probe for each."""
    with open_state(place) as state:
        state.tasks.add(LOCAL.tenant, "mood", adapter, lambda *_: None, by="a test")
        digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
        for digest in digests:
            folder = place / "blobs" / digest[:2]
            folder.mkdir(exist_ok=True)
            (folder / f"{digest}.safetensors").write_bytes(b"never read")
        rows = [{"id": 2 + n, "tenant": LOCAL.tenant, "name": f"task-{n}"} for n in range(count)]
        versions = [
            {"task": 2 + n, "number": 1, "digest": digest, "bytes": 10, "created": 0.0, "by": "a test"}
            for n, digest in enumerate(digests)
        ]
        aliases = [{"task": 2 + n, "alias": "current", "number": 1, "previous": None} for n in range(count)]
        with state._database.writing() as connection:
            connection.execute(insert(database.tasks).values(next_number=2, deleted=False), rows)
            connection.execute(insert(database.versions), versions)
            connection.execute(insert(database.aliases), aliases)


def test_without_keys_on_the_loopback_only(conv_bundle: Bundle, tmp_path: Path) -> None:
    with server(conv_bundle.path, "--state", tmp_path / "state", "--port", 0, "--no-auth") as (_, url):
        assert httpx.get(f"{url}/v2/admin/keys").json() == []
    refused = command("serve", conv_bundle.path, "--state", tmp_path / "state", "--no-auth", "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "loopback" in refused.stderr


@pytest.mark.parametrize("arguments", [("--port", "x"), ("--role", "x"), ()])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert command("serve", *arguments).returncode == 2
    assert command("keys", "create", *arguments).returncode == 2

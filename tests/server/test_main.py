"""`tpeft-deploy serve` and `keys` in processes of their own, as one starts them."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest
from sqlalchemy import insert

from tests.helpers.server.audited import audited
from tests.helpers.server.processes import CODE, command, server
from tests.helpers.server.v2_bodies import tensor
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter, Bundle, Client, Runtime
from tpeft_deploy.runtime.server.registry import open_state, schema

FREEZING = f"""
import gc, sys
freeze = gc.freeze
gc.freeze = lambda: (freeze(), print("frozen", file=sys.stderr, flush=True))
{CODE}
"""


def test_a_key_a_request_and_a_drain(conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]) -> None:
    state = tmp_path / "state"
    with server(conv_bundle.path, "--state", state, "--port", 0, "--threads", 1) as (process, url):
        made = command("keys", "create", "--state", state, "--tenant", "acme", "--role", "deploy", "--json")
        document = json.loads(made.stdout)
        assert set(document) == {"id", "tenant", "role", "key"}
        assert not made.stderr

        def status() -> int:
            return httpx.get(
                f"{url}/v2", headers={"Authorization": f"Bearer {document['key']}"}, timeout=100
            ).status_code

        wait_until(lambda: status() == 200, "a new key works")
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
        wait_until(lambda: status() == 401, "a revoked key is refused")

        in_use = command("serve", conv_bundle.path, "--state", state, "--port", 0)
        assert in_use.returncode == 1
        assert "another server" in in_use.stderr.splitlines()[-1] or "no other server" in in_use.stderr.splitlines()[-1]
        taken = command("serve", conv_bundle.path, "--state", tmp_path / "other", "--port", url.rpartition(":")[2])
        assert taken.returncode == 1
        assert taken.stderr.count("\n") == 1

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 0
    again = command("keys", "list", "--state", state, "--json")
    (listed,) = json.loads(again.stdout)["keys"]
    assert listed["revoked"] is not None
    assert document["key"] not in again.stdout


def test_it_opens_no_more_files_to_start_with_many_registered_adapters(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]
) -> None:
    opened: dict[int, int] = {}
    for count in (10, 2000):
        place = tmp_path / str(count)
        _register(place / "state", count, others[0])
        with audited(conv_bundle, place) as found:
            opened[count] = sum(str(found.state) in line[1] for line in found.did_to_start() if line[0] == "open")
            listed = found.ask("GET", "/v2/registry/tasks").json()
            assert sum(task["name"].startswith("task-") for task in listed) == count
            assert found.ask("POST", "/v2/models/mood/infer", json={"inputs": [tensor()]}).status_code == 200
    assert opened[10] == opened[2000]


def _register(place: Path, count: int, adapter: Adapter) -> None:
    """One task that answers, and many as `Tasks.add` leaves them, without a transaction and a probe for each."""
    with open_state(place) as state:
        state.tasks.add("acme", "mood", adapter, lambda *_: None, by="a test")
        digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
        for digest in digests:
            folder = place / "blobs" / digest[:2]
            folder.mkdir(exist_ok=True)
            (folder / f"{digest}.safetensors").write_bytes(b"never read")
        rows = [{"id": 2 + n, "tenant": "acme", "name": f"task-{n}"} for n in range(count)]
        versions = [
            {"task": 2 + n, "number": 1, "digest": digest, "bytes": 10, "created": 0.0, "by": "a test"}
            for n, digest in enumerate(digests)
        ]
        aliases = [{"task": 2 + n, "alias": "current", "number": 1, "previous": None} for n in range(count)]
        with state._database.writing() as connection:
            connection.execute(insert(schema.tasks).values(next_number=2, deleted=False), rows)
            connection.execute(insert(schema.versions), versions)
            connection.execute(insert(schema.aliases), aliases)


def test_without_keys_on_the_loopback_only(conv_bundle: Bundle, tmp_path: Path) -> None:
    said: list[str] = []
    options = ["--state", tmp_path / "state", "--port", 0, "--no-auth"]
    with server(conv_bundle.path, *options, code=FREEZING, said=said) as (_, url):
        assert httpx.get(f"{url}/v2/admin/keys").json() == []
        assert "frozen\n" in said  # before it says where it listens
    refused = command("serve", conv_bundle.path, "--state", tmp_path / "state", "--no-auth", "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "loopback" in refused.stderr


@pytest.mark.parametrize("arguments", [("--port", "x"), ("--role", "x"), ()])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert command("serve", *arguments).returncode == 2
    assert command("keys", "create", *arguments).returncode == 2

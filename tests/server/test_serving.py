"""`tpeft-deploy serve` and `keys` in processes of their own, as one starts them."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.server.conftest import PIXELS
from tests.server.processes import command, server
from tpeft_deploy import Adapter, Bundle, Client, Runtime


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

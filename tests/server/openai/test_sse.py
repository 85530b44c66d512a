"""Streams of a server that drains."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.helpers.server.processes import server
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle

# Steps are slow while the file is there.
SLOW = """
import os, time
from tpeft_deploy.cli import main
from tpeft_deploy.runtime.generation.decoder import BankedDecoder

def decode(self, *arguments):
    time.sleep(0.1 * os.path.exists(os.environ["SLOW"]))
    return own(self, *arguments)

own, BankedDecoder.decode = BankedDecoder.decode, decode
main()
"""


@pytest.mark.parametrize("seconds", [1, 100])
def test_a_drain_lets_streams_finish_within_its_time(
    talking: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    monkeypatch.setenv("SLOW", str(slow))
    monkeypatch.setenv("TPEFT_DRAIN_SECONDS", f"{seconds}s")
    options = ["--state", tmp_path / "state", "--port", 0, "--no-auth", "--no-access-log", "--threads", 1]
    body = {"model": "a", "prompt": "x", "max_tokens": 900, "stream": True, "logit_bias": {"1": -100}}
    with (
        server(talking.path, *options, code=SLOW) as (process, url),
        httpx.Client(base_url=url, timeout=100) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(url), "that it refuses")
        if seconds > 1:
            slow.unlink()
        events = [line.removeprefix("data: ") for line in lines if line]
        assert process.wait(100) == 0
    if seconds > 1:
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    else:
        assert json.loads(events[-1])["error"]["code"] == "service_unavailable"
        assert len(events) < 900


def refuses(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=100).status_code == 503
    except httpx.TransportError:
        return True

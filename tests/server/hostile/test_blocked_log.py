"""A stderr that nobody reads: lines are dropped and counted, and nothing else stops."""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.server.processes import server
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.telemetry import log_lines
from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines, QueuedHandler


class Blocked:
    """A stream that takes nothing until it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.text = ""

    def write(self, text: str) -> int:
        assert self.go.wait(60)
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    own = Blocked()
    yield own
    own.go.set()


def test_a_server_answers_and_ends_though_nobody_reads_its_log(conv_bundle: Bundle, tmp_path: Path) -> None:
    flags = ("--state", tmp_path / "state", "--port", 0, "--threads", 1, "--no-auth")
    with server(conv_bundle.path, *flags) as (process, url):
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        for _ in range(2000):
            connection.request("GET", "/v2/models/nothing/ready")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 404
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 0


def test_lines_without_room_are_dropped_and_counted(blocked: Blocked) -> None:
    lines = LogLines(blocked)  # type: ignore[arg-type]
    for _ in range(log_lines._MOST + 10):
        lines.put(b"x")
    assert 8 <= lines.dropped <= 10  # one or two may be with the writer already
    dropped = lines.dropped
    blocked.go.set()
    lines.close(60)
    assert blocked.text.count("x\n") == log_lines._MOST + 10 - dropped
    assert f'{{"dropped":{dropped}}}\n' in blocked.text


def test_waiting_lines_are_bounded_in_bytes(blocked: Blocked) -> None:
    lines = LogLines(blocked)  # type: ignore[arg-type]
    for _ in range(40):
        lines.put(bytes(1 << 20))
    assert lines.dropped > 20


def test_records_go_through_the_queue_with_bounded_length(blocked: Blocked) -> None:
    lines = LogLines(blocked)  # type: ignore[arg-type]
    log = logging.getLogger("tests.apart")
    log.propagate = False
    log.addHandler(QueuedHandler(lines))
    log.error("it failed: %s", "y" * 5_000_000)
    log.error("%d", "no number")
    blocked.go.set()
    lines.close(60)
    first, second = blocked.text.splitlines()
    assert len(first) < 20_000
    assert second == "a record of tests.apart cannot be shown"


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    lines = LogLines()
    lines._descriptor = writing
    lines.say("nobody reads this")
    wait_until(lambda: lines.dropped == 1, "the line is counted")
    lines.close()
    os.close(writing)

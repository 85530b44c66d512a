"""`health` says what the server says, as an exit code."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from tpeft_deploy.cli import main


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers everything with a status; its port, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "flags", "path"), [(200, [], "live"), (200, ["--ready"], "ready"), (503, [], "live")]
)
def test_it_asks_and_tells(status: int, flags: list[str], path: str) -> None:
    with answering(status) as (port, asked):
        found = CliRunner().invoke(main, ["health", *flags], env={"TPEFT_PORT": str(port), "TPEFT_HOST": "0.0.0.0"})
    assert asked == [f"/v2/health/{path}"]
    assert found.exit_code == (status != 200), found.output


def test_nobody_there_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = CliRunner().invoke(main, ["health", "--port", str(port)])
    assert found.exit_code == 1
    assert len(found.output.strip().splitlines()) == 1
    assert "Traceback" not in found.output

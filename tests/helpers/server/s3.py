"""An S3 API in a process; its objects outlive it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from tests.helpers.server.relay import Relay
from tests.helpers.waiting import SECONDS, wait_until
from tpeft_deploy import Adapter
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.server.registry import open_state


class S3:
    """Moto's server, which repeats the recorded requests before clients reach it again.

    Args:
        place: directory for the record.
    """

    def __init__(self, place: Path) -> None:
        self._record = place / "requests"
        with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
            public, self._port = free.getsockname()[1], other.getsockname()[1]
        self.url = f"http://127.0.0.1:{public}"
        self._inner = f"http://127.0.0.1:{self._port}"
        self._relay = Relay(public, self._port)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a client finds it."""
        names = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**names, "AWS_ENDPOINT_URL": self.url}

    def start(self) -> None:
        line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        environment = {**os.environ, "MOTO_RECORDER_FILEPATH": str(self._record)}
        self._process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, "the start of the S3 API")
        if self._record.exists():
            self._record.write_text("".join(filter(_changes, self._record.read_text().splitlines(keepends=True))))
            self._recorder("replay-recording")
        self._recorder("start-recording")
        self._relay.open()

    def kill(self) -> None:
        self._relay.cut()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def bucket(self, name: str) -> str:
        # Moto loads what answers for S3 with its first request.
        assert httpx.put(f"{self.url}/{name}", timeout=SECONDS).status_code == 200
        return f"s3://{name}"

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self._inner}/moto-api/", timeout=SECONDS).status_code == 200
        except httpx.TransportError:
            return False

    def _recorder(self, action: str) -> None:
        assert httpx.post(f"{self._inner}/moto-api/recorder/{action}", timeout=SECONDS).status_code == 200


def _changes(line: str) -> bool:
    """Whether a recorded request is whole and may change something: there are many more that only read."""
    return line.endswith("\n") and json.loads(line)["method"] not in {"GET", "HEAD"}


def register(place: Path, url: str) -> None:
    """Register one version after another, each said once it is acknowledged; their bytes are random."""
    adapter = Adapter({}, {"a.weight": np.zeros(1, np.float32)})
    with open_state(place, store=url) as state:
        print(json.dumps("ready"), flush=True)
        number = 0
        while True:
            number += 1
            try:
                record = state.tasks.add(
                    "acme", f"task-{number % 3}", adapter, lambda *_: None, by="a key", data=os.urandom(5000)
                )
            except TpeftError:
                time.sleep(0.01)
                continue
            print(json.dumps([record.task, record.number, record.digest]), flush=True)

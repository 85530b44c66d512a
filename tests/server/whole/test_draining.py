"""SIGTERM with requests in flight: those that came are answered in full, others are told so, and it ends in time."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from tests.helpers.server.processes import HELD, grpc_address, server
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle, Client, Runtime
from tpeft_deploy.errors import TpeftError, Unavailable
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import SERVICE

PIXELS = np.random.default_rng(1).standard_normal((1, 1, 12, 14)).astype(np.float32)
TASKS = ("plain", "two", "partial", "base")
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Busy:
    """A server, and requests that it answers once `hold` is gone."""

    process: subprocess.Popen[str]
    url: str
    rpc: str
    hold: Path
    waiting: dict[Future[Array], str]

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=100)

    def ask(self, pool: ThreadPoolExecutor, count: int) -> None:
        """Send requests over HTTP and gRPC in turn, and return when all have come."""
        for number in range(count):
            task = TASKS[number // 2 % len(TASKS)]
            call: Callable[[str], Array] = self._over_http if number % 2 else self._over_grpc
            self.waiting[pool.submit(call, task)] = task
        # One is in the run that is held, the others wait for it.
        wait_until(lambda: self.queued() + 1 >= count, "all requests")

    def queued(self) -> int:
        lines = self.http.get("/metrics").text.splitlines()
        return round(next(float(line.split()[1]) for line in lines if line.startswith("tpeft_queue_rows ")))

    def ready(self) -> int:
        return self.http.get("/v2/health/ready").status_code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask for it, and return when it is seen."""
        self.process.send_signal(number)
        wait_until(lambda: self.ready() == 503, "that it says it stops")

    def _over_http(self, task: str) -> Array:
        with Client(self.url, timeout=100, retries=0) as client:
            return client.infer({"pixels": PIXELS}, task)["logits"]

    def _over_grpc(self, task: str) -> Array:
        answer = pb.ModelInferResponse.FromString(self.call(asked(task, PIXELS), timeout=100))
        return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)

    def call(self, request: pb.ModelInferRequest, timeout: float) -> bytes:
        with grpc.insecure_channel(self.rpc) as channel:
            data: bytes = channel.unary_unary(f"/{SERVICE}/ModelInfer")(request.SerializeToString(), timeout=timeout)
            return data


def asked(task: str, pixels: Array) -> pb.ModelInferRequest:
    tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape)}
    return pb.ModelInferRequest(model_name=task, inputs=[tensor], raw_input_contents=[pixels.tobytes()])


@contextmanager
def busy(bundle: Bundle, place: Path, monkeypatch: pytest.MonkeyPatch, count: int, **settings: str) -> Iterator[Busy]:
    for name, value in {"queue_share": "1", "max_rows": "1", **settings}.items():
        monkeypatch.setenv(f"TPEFT_{name.upper()}", value)
    hold = place / "hold"
    monkeypatch.setenv("HOLD", str(hold))
    options = ["--state", place / "state", "--port", 0, "--grpc-port", 0, "--no-auth", "--no-access-log"]
    with ThreadPoolExecutor(count) as pool:
        with server(bundle.path, *options, "--threads", 1, code=HELD) as (process, url):
            own = Busy(process, url, grpc_address(process), hold, {})
            hold.touch()
            with own.http:
                own.ask(pool, count)
                yield own
        for future in own.waiting:
            future.exception(timeout=100)  # with the server they have ended


def test_what_came_is_answered_in_full_and_what_comes_while_load_balancers_notice(
    conv_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
        expected = {task: runtime.run({"pixels": PIXELS}, task=task)["logits"] for task in TASKS}
    # A machine may be so busy that the grace is over before the server was looked at.
    if not any(_drains(conv_bundle, tmp_path / str(s), monkeypatch, s, expected) for s in (3, 15, 100)):
        raise AssertionError("no grace lasted as long as the server was looked at")


def _drains(
    bundle: Bundle, place: Path, monkeypatch: pytest.MonkeyPatch, grace: int, expected: dict[str, Array]
) -> bool:
    """Stop a server with requests in flight, and ask it more; False where its grace was too short for that."""
    with busy(bundle, place, monkeypatch, 8, drain_grace=f"{grace}s") as own:
        began = time.monotonic()
        try:
            own.stop()
            assert not any(future.done() for future in own.waiting)
            assert own.http.get("/v2/models/plain/ready").status_code == 503
            assert own.http.get("/v2/health/live").status_code == 200
            own.hold.unlink()
            with ThreadPoolExecutor(2) as pool:
                own.waiting[pool.submit(own._over_http, "two")] = "two"
                own.waiting[pool.submit(own._over_grpc, "plain")] = "plain"
            answers = [(future.result(200), task) for future, task in own.waiting.items()]
        except (httpx.TransportError, TpeftError, grpc.RpcError):
            if time.monotonic() - began < grace:
                raise
            return False
        for answer, task in answers:
            np.testing.assert_allclose(answer, expected[task], rtol=1e-4, atol=1e-5)
        assert own.process.wait(200) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{own.url}/v2/health/live", timeout=100)
    return True


def test_a_drain_ends_when_its_time_is_over(
    conv_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with busy(conv_bundle, tmp_path, monkeypatch, 8, drain_seconds="1s") as own:
        own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(100) == 0
        left = [future.exception(timeout=100) for future in own.waiting]
        assert own.process.stderr is not None
        assert "Traceback" not in own.process.stderr.read()
    assert [type(error) for error in left[1::2]] == [Unavailable] * 4  # over HTTP
    assert [error.code() for error in left[::2] if isinstance(error, grpc.RpcError)] == [
        grpc.StatusCode.UNAVAILABLE
    ] * 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    conv_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with busy(conv_bundle, tmp_path, monkeypatch, 8, drain_grace="1000s") as own:
        own.stop()
        own.process.send_signal(number)
        assert own.process.wait(100) == -number

"""Two servers of one registry behind nginx and HAProxy: uploads, answers, gRPC, and the drain and the end of one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.server.postgres import Postgres
from tests.helpers.server.processes import grpc_address, server
from tests.helpers.server.proxies import PROXIES, program, running
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter, Bundle, Client, Runtime
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.tucker import Array


@dataclass
class Fleet:
    """Servers, and sockets of the proxies in front of them."""

    place: Path
    key: str
    admin: str
    urls: list[str] = field(default_factory=list)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def client(self, proxy: str) -> Client:
        transport = httpx.HTTPTransport(uds=str(self.place / proxy / "front-80.sock"))
        return Client("http://127.0.0.1", self.key, transport=transport, timeout=100)

    def rows(self, task: str) -> list[float]:
        """Rows of a task that each server has answered."""
        return [self._rows(url, task) for url in self.urls]

    def over_grpc(self, proxy: str, task: str) -> Array:
        tensor = {"name": "pixels", "datatype": "FP32", "shape": list(PIXELS.shape)}
        request = pb.ModelInferRequest(model_name=task, inputs=[tensor], raw_input_contents=[PIXELS.tobytes()])
        metadata = (("authorization", f"Bearer {self.key}"), ("tpeft-task", task))
        address = f"unix:{self.place / proxy / 'front-9000.sock'}"
        with grpc.insecure_channel(address, options=[("grpc.default_authority", "proxy")]) as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            data: bytes = call(request.SerializeToString(), metadata=metadata, timeout=100)
        answer = pb.ModelInferResponse.FromString(data)
        return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)

    def ready(self) -> bool:
        """Whether all servers are ready; the second waits until the first has left it a part of all rates."""
        return self._all_answer("/v2/health/ready")

    def knows(self, task: str) -> bool:
        """Whether all servers know a task; one learns of it from another after it is registered."""
        return self._all_answer(f"/v2/models/{task}/ready")

    def _all_answer(self, path: str) -> bool:
        return all(self._get(url, path, self.key).status_code == 200 for url in self.urls)

    def _get(self, url: str, path: str, key: str) -> httpx.Response:
        return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=100)

    def _rows(self, url: str, task: str) -> float:
        text = self._get(url, "/metrics", self.admin).text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == "tpeft_rows_total" and s.labels["task"] == task)


@pytest.fixture
def fleet(conv_bundle: Bundle, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    for proxy in PROXIES:
        program(proxy)
    url, store = postgres.empty(), f"file:{tmp_path / 'store'}"
    with open_state(tmp_path / "keys", url, store=store) as state:
        key, admin = (state.keys.create("acme", role, by="a test")[1] for role in ("deploy", "admin"))
    for name, value in {"DATABASE_URL": url, "STORE_URL": store, "DRAIN_GRACE": "1000s"}.items():
        monkeypatch.setenv(f"TPEFT_{name}", value)
    place = Path(tempfile.mkdtemp(prefix="tpeft-proxy-"))
    own, addresses = Fleet(place, key, admin), {"10.0.0.13:8080": "127.0.0.1:1", "10.0.0.13:9000": "127.0.0.1:1"}
    options = ["--port", 0, "--grpc-port", 0, "--no-access-log", "--threads", 1]
    try:
        with ExitStack() as stack:
            for number in (11, 12):  # of the third, nothing is there
                begun = server(conv_bundle.path, "--state", tmp_path / f"state-{number}", *options)
                process, address = stack.enter_context(begun)
                own.processes.append(process)
                own.urls.append(address)
                addresses[f"10.0.0.{number}:8080"] = address.removeprefix("http://")
                addresses[f"10.0.0.{number}:9000"] = grpc_address(process)
            wait_until(own.ready, "that both servers are ready")  # until then HAProxy sends a request to the other one
            for proxy in PROXIES:
                (place / proxy).mkdir()
                stack.enter_context(running(proxy, place / proxy, addresses))
            # Until then a request for it goes to any other, and another one over gRPC.
            log = place / "haproxy" / "haproxy.log"
            wait_until(lambda: "grpc_tasks/three is DOWN" in log.read_text(), "that HAProxy misses the third")
            yield own
    finally:
        shutil.rmtree(place)


def test_each_task_is_answered_by_one_server_until_that_one_ends(
    fleet: Fleet, conv_bundle: Bundle, others: list[Adapter], tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(others[0].to_bytes())
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
        runtime.load("it", file)
        expected = runtime.run({"pixels": PIXELS}, task="it")["logits"]

    def check(answer: object) -> None:
        np.testing.assert_allclose(np.asarray(answer), expected, rtol=1e-4, atol=1e-5)

    tasks = {proxy: [f"{proxy}-{number}" for number in range(6)] for proxy in PROXIES}
    for proxy, names in tasks.items():
        with fleet.client(proxy) as client:
            for name in names:
                client.register(name, file)
                wait_until(lambda: fleet.knows(name), "that all servers know it")  # noqa: B023
                for version in (name, f"{name}@1", f"{name}@current"):
                    check(client.infer({"pixels": PIXELS}, version)["logits"])
                assert sorted(fleet.rows(name)) == [0, 3 * len(PIXELS)]
                check(fleet.over_grpc(proxy, name))
                assert sum(fleet.rows(name)) == 4 * len(PIXELS)
                if proxy == "haproxy":
                    assert sorted(fleet.rows(name)) == [0, 4 * len(PIXELS)]

    def answered_by_first(proxy: str) -> bool:
        """Ask for all tasks, and return whether the first server answered one."""
        before = [fleet._rows(fleet.urls[0], name) for name in tasks[proxy]]
        with fleet.client(proxy) as client:
            for name in tasks[proxy]:
                check(client.infer({"pixels": PIXELS}, name)["logits"])
        return before != [fleet._rows(fleet.urls[0], name) for name in tasks[proxy]]

    fleet.processes[0].send_signal(signal.SIGTERM)  # it answers for a long time yet
    wait_until(lambda: not answered_by_first("haproxy"), "that HAProxy sees the drain")
    fleet.processes[0].kill()
    fleet.processes[0].wait(100)
    for proxy, names in tasks.items():
        with fleet.client(proxy) as client:
            for name in names:
                check(client.infer({"pixels": PIXELS}, name)["logits"])
                check(fleet.over_grpc(proxy, name))

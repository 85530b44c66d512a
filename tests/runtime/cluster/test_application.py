"""A cluster of Ray Serve on this machine: its protocols, its registry, and a replica that dies."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from tests.helpers.cluster_packages import needs
from tests.helpers.runtime.clusters import Cluster, cluster
from tests.helpers.runtime.ray_nodes import nodes
from tests.helpers.server.text_bundle import text_bundle
from tests.helpers.waiting import wait_until
from tpeft_deploy import Client, Runtime
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.tucker import Array

pytestmark = [pytest.mark.cluster, needs("ray")]
REPLICA = "ServeReplica:tpeft:replica"
SEQUENCES = 64  # more than the 32 rows of one replica
ENDLESS = {"1": -100.0}


@dataclass(frozen=True)
class Subject:
    """A cluster, and what a local runtime answers."""

    cluster: Cluster
    place: Path
    inputs: dict[str, Array]
    logits: dict[str, Array]

    def check(self, client: Client, task: str, expected: str) -> None:
        found = client.infer(self.inputs, task, outputs=["logits"])["logits"]
        np.testing.assert_allclose(found, self.logits[expected], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    place = tmp_path_factory.mktemp("cluster")
    bundle = text_bundle(place)
    inputs = dict(bundle.example())
    with Runtime(bundle.path, provider="cpu", threads=1) as local:
        logits = {task: local.run(inputs, task, outputs=["logits"])["logits"] for task in ("a", "b", "base")}
    # Beside another Ray on this machine, which it does not use.
    with nodes(place / "other.log", {}), cluster(bundle.path, place / "state", "--replicas", 2, "--no-auth") as own:
        yield Subject(own, place, inputs, logits)
        own.stop()


def test_every_protocol_answers_as_a_local_runtime(subject: Subject) -> None:
    with Client(subject.cluster.url, timeout=120) as client:
        for task in subject.logits:
            subject.check(client, task, task)
        client.register("new", subject.place / "b")  # reaches the replicas by the registry's files alone
        subject.check(client, "new", "b")
        mixed = client.infer(subject.inputs, tasks=["new", "a"], outputs=["logits"])["logits"]
        expected = [subject.logits["b"][0], subject.logits["a"][1]]
        np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)
        whole = client.generate("hello", "a", max_tokens=8).text
        with client.generate("hello", "a", stream=True, max_tokens=8) as pieces:
            assert "".join(pieces) == whole
        with pytest.raises(TpeftError, match="nowhere"):
            client.infer(subject.inputs, "nowhere")
    found = _over_grpc(subject.cluster.grpc, subject.inputs)
    np.testing.assert_allclose(found, subject.logits["a"], rtol=1e-4, atol=1e-5)


def test_a_replica_that_dies_fails_no_inference(subject: Subject) -> None:
    failed: list[Exception] = []
    stop, answered = threading.Event(), threading.Semaphore(0)

    def ask() -> None:
        with Client(subject.cluster.url, timeout=120, retries=0) as client:
            while not stop.is_set():
                try:
                    subject.check(client, "a", "a")
                except Exception as error:
                    failed.append(error)
                answered.release()

    wait_until(lambda: len(subject.cluster.processes(REPLICA)) == 2, "two replicas")
    victim = subject.cluster.processes(REPLICA)[0]
    asking = threading.Thread(target=ask)
    asking.start()
    for number in range(25):
        assert answered.acquire(timeout=120)
        if number == 5:
            os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(set(subject.cluster.processes(REPLICA)) - {victim}) == 2, "a new replica")
    stop.set()
    asking.join(120)
    assert not failed


def test_a_stream_ends_with_its_replica(subject: Subject) -> None:
    with Client(subject.cluster.url, timeout=120, retries=0) as client:
        wait_until(lambda: _answers(subject, client), "an answer")
        with (
            pytest.raises(TpeftError, match="gone"),
            client.generate("hello", "a", stream=True, max_tokens=900, logit_bias={"1": -100}) as pieces,
        ):
            for number, _ in enumerate(pieces):
                if number == 0:
                    for victim in subject.cluster.processes(REPLICA):
                        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: _answers(subject, client), "an answer of a new replica")


def test_a_replica_is_added_while_sequences_wait(tmp_path: Path) -> None:
    bundle = text_bundle(tmp_path)
    state = tmp_path / "state"
    with cluster(bundle.path, state, "--replicas", 1, "--max-replicas", 2, "--no-auth") as own, ExitStack() as stack:
        with Client(own.url, timeout=120) as client:
            expected = {task: client.generate("hello", task, max_tokens=8).text for task in "ab"}
        stop, ended = threading.Event(), threading.Semaphore(0)
        pool = stack.enter_context(ThreadPoolExecutor(SEQUENCES))
        stack.callback(stop.set)

        def ask(task: str) -> None:
            with Client(own.url, timeout=120) as client:
                while not stop.is_set():
                    began = time.monotonic()
                    with client.generate("hello", task, stream=True, max_tokens=300, logit_bias=ENDLESS) as pieces:
                        text = ""
                        for piece in pieces:
                            text += piece
                            if stop.is_set():
                                break
                    assert expected[task].startswith(text) or text.startswith(expected[task])
                    seconds.append(time.monotonic() - began)
                    ended.release()

        seconds: list[float] = []  # that sequences took
        asking = [pool.submit(ask, "ab"[number % 2]) for number in range(SEQUENCES)]
        wait_until(lambda: len(own.processes(REPLICA)) == 2, "a second replica")
        for _ in range(2 * SEQUENCES):
            assert ended.acquire(timeout=120)
        print(f"{SEQUENCES} streams: {statistics.median(seconds[:SEQUENCES]):.1f} s for each of the first, median")
        stop.set()
        for sequence in asking:
            sequence.result(120)
        own.stop()


def _answers(subject: Subject, client: Client) -> bool:
    with suppress(TpeftError):
        subject.check(client, "a", "a")
        return True
    return False


def _over_grpc(address: str, inputs: dict[str, Array]) -> Array:
    sent = []
    for name, array in inputs.items():
        sent.append(InferInput(name, list(array.shape), {"int64": "INT64", "float32": "FP32"}[array.dtype.name]))
        sent[-1].set_data_from_numpy(array)
    with InferenceServerClient(address) as client:
        found: Array = client.infer("a", sent, outputs=[InferRequestedOutput("logits")]).as_numpy("logits")
        return found

"""SIGKILL of the parts of a cluster under load: nothing acknowledged is lost, and no answer is by a wrong adapter."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import nets
from tests.helpers.cluster_packages import needs
from tests.helpers.runtime.cluster_load import REFUSED, ClusterLoad
from tests.helpers.runtime.clusters import cluster
from tests.helpers.runtime.ray_nodes import MARK, Nodes, marked, nodes
from tests.helpers.server.acknowledged import Log, everything_is_as_acknowledged, make_keys
from tests.helpers.server.load import OPERATOR, Expected, digest_of
from tests.helpers.server.postgres import Postgres, running
from tests.helpers.server.s3 import S3
from tests.helpers.waiting import SECONDS, wait_until
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.cluster.proxy_answers import MIDDLEWARES, PROXY_CALLBACK

pytestmark = [pytest.mark.cluster, needs("ray", "s3fs", "moto")]
REPLICA, INGRESS = "ServeReplica:tpeft:replica", "ServeReplica:tpeft:ingress"
REPLICAS = 2


@dataclass
class Subject:
    """A cluster of two nodes beside its head, its database and its store, and what asks it."""

    nodes: Nodes
    postgres: Postgres
    s3: S3
    load: ClusterLoad
    log: Log
    temporary: Path

    def processes(self, title: str) -> list[int]:
        return marked({MARK: self.nodes.mark}, title)

    def whole(self) -> bool:
        """Whether all parts run, and the cluster answers."""
        if (len(self.processes(REPLICA)), len(self.processes(INGRESS))) != (REPLICAS, 1):
            return False
        with self.load.client(OPERATOR) as http, suppress(*REFUSED):
            return http.get("/v2/health/ready").status_code == 200
        return False

    def kill_replica(self, choice: random.Random) -> None:
        os.kill(choice.choice(self.processes(REPLICA)), signal.SIGKILL)

    def kill_ingress(self, choice: random.Random) -> None:
        os.kill(self.processes(INGRESS)[0], signal.SIGKILL)

    def kill_node(self, choice: random.Random) -> None:
        """The node of the ingress, if it is not that of the head: most is lost with it."""
        found = [name for name in self.nodes.running if self.nodes.processes(name, INGRESS)]
        self.load.refused["the ingress was lost with its node"] += len(found)
        self.nodes.kill(found[0] if found else choice.choice(self.nodes.running))
        self.nodes.add()

    def kill_database(self, choice: random.Random) -> None:
        self.postgres.crash()

    def kill_store(self, choice: random.Random) -> None:
        self.s3.kill()
        time.sleep(choice.uniform(0, 0.5))  # at any moment of what goes on
        self.s3.start()


KILLS: dict[str, Callable[[Subject, random.Random], None]] = {
    "replica": Subject.kill_replica,
    "ingress": Subject.kill_ingress,
    "node": Subject.kill_node,
    "database": Subject.kill_database,
    "store": Subject.kill_store,
}


@pytest.fixture(scope="module")
def uploads() -> dict[str, bytes]:
    """Digest -> file, of adapters that the bundle does not have."""
    module = nets.conv_net()[0]
    targets = {"up.weight": (4, 4), "stem.weight": (2, 1, 2, 2)}
    made = [nets.adapter_for(module, targets, seed=10 * n) for n in range(12)]
    return {digest_of(adapter.to_bytes()): adapter.to_bytes() for adapter in made}


@pytest.fixture(scope="module")
def subject(
    conv_bundle: Bundle, uploads: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    place = tmp_path_factory.mktemp("cluster")
    s3, state = S3(place), place / "state"
    s3.start()
    try:
        with running() as postgres:
            url = postgres.empty()
            keys = make_keys(state, url)
            store = s3.bucket("adapters-of-a-cluster")
            environment = {**s3.environment, "TPEFT_DATABASE_URL": url, "TPEFT_STORE_URL": store}
            environment |= {"TPEFT_ACCESS_LOG": "false", PROXY_CALLBACK: MIDDLEWARES}
            (place / "tmp").mkdir()
            environment |= {"TMPDIR": str(place / "tmp"), "RAY_TMPDIR": "/tmp"}  # Ray's paths are bounded
            with nodes(place / "nodes.log", environment) as own:
                own.add()
                own.add()
                environment |= {MARK: own.mark, "RAY_ADDRESS": own.address}
                with cluster(conv_bundle.path, state, "--replicas", REPLICAS, environment=environment) as served:
                    wanted = Expected.of(conv_bundle, uploads, place)
                    load = ClusterLoad(keys, uploads, wanted, conv_bundle.manifest.name)
                    load.url = served.url
                    yield Subject(own, postgres, s3, load, Log(load), place / "tmp")
    finally:
        s3.kill()


SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("part", KILLS)
@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.timeout(600)), pytest.param(20, marks=SOAK)])
def test_a_part_killed_under_load_loses_nothing_and_makes_no_wrong_answer(
    subject: Subject, part: str, kills: int
) -> None:
    load = subject.load
    before = load.changes, load.answers, Counter(load.refused), Counter(load.unclear)
    recoveries: list[float] = []
    try:
        for seed in range(kills):
            recoveries.append(kill_once(subject, part, seed))
            wait_until(subject.whole, "all parts")
            subject.log.settle()
            everything_is_as_acknowledged(load)
            load.judge()
            # One directory for the weights of each replica, and one for its adapters.
            assert len(list(subject.temporary.glob("tpeft-*"))) <= 2 * REPLICAS
    finally:
        figures = {
            "changes": load.changes - before[0],
            "answers": load.answers - before[1],
            "refused": dict(load.refused - before[2]),
            "unclear": dict(load.unclear - before[3]),
            "seconds to recovery, median": round(statistics.median(recoveries or [0]), 1),
            "worst": round(max(recoveries, default=0), 1),
        }
        print(f"{len(recoveries)} kills, {part}: {figures}")


def kill_once(subject: Subject, part: str, seed: int) -> float:
    """Seconds until each of the clients was answered again."""
    load, choice = subject.load, random.Random(f"{part} {seed}")
    wait_until(subject.whole, "all parts")
    load.over.clear()
    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(client) for client in load.clients(seed)]
        try:
            load.wait(choice.randint(4, 8), choice.randint(10, 20))
            killed = time.monotonic()
            KILLS[part](subject, choice)
            recovery = load.recovered(killed)
        finally:
            load.over.set()
        for client in clients:
            client.result(3 * SECONDS)
    return recovery

"""The runtime over replicas: the answers of a local one, where adapters go, and what the death of a replica does."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.runtime.local_replicas import LocalReplicas
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import InputError, Unavailable, UnknownTask
from tpeft_deploy.runtime import Source
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.cluster.affinity import ReplicaTable
from tpeft_deploy.runtime.cluster.calls import ReplicaCalls
from tpeft_deploy.runtime.cluster.remote.remote_runtime import RemoteRuntime
from tpeft_deploy.runtime.cluster.wire import Figures
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

PIXELS = np.random.default_rng(0).standard_normal((4, 1, 12, 14)).astype(np.float32)
ROOT = Path(__file__).parents[4]


@asynccontextmanager
async def remote(bundle: Bundle, blobs: Blobs, count: int = 2) -> AsyncIterator[tuple[RemoteRuntime, LocalReplicas]]:
    replicas = LocalReplicas(bundle, blobs.read, count)
    own = RemoteRuntime(bundle, replicas, replicas.table, lambda _: Quota(), asyncio.get_running_loop())
    try:
        await own.open()
        yield own, replicas
    finally:
        replicas.close()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def run(
    bundle: Bundle, blobs: Blobs, work: Callable[[RemoteRuntime, LocalReplicas], Awaitable[None]], count: int = 2
) -> None:
    async def all_of_it() -> None:
        async with remote(bundle, blobs, count) as (own, replicas):
            await work(own, replicas)

    asyncio.run(all_of_it())


def registered(own: RemoteRuntime, blobs: Blobs, key: str, seed: int = 0) -> Adapter:
    """Register an adapter that only the registry's files have."""
    adapter = nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}, seed=seed)
    digest = blobs.write(adapter.to_bytes())

    def never() -> Adapter:
        raise AssertionError("the ingress reads no adapter")

    own.register({key: Source(digest, never)})
    return adapter


def test_answers_are_those_of_a_local_runtime(conv_bundle: Bundle, blobs: Blobs) -> None:
    async def work(own: RemoteRuntime, _: LocalReplicas) -> None:
        adapter = registered(own, blobs, "acme/new@1")
        with Runtime(conv_bundle.path, provider="cpu", threads=1) as local:
            local.load("new", adapter)
            timing = Timing(0.0)
            found = await own.infer({"pixels": PIXELS}, "acme/new@1", tenant="acme", timing=timing)
            expected = local.run({"pixels": PIXELS}, "new")
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
            assert timing.rows == 4
            assert timing.ran > 0
            names = ["two", "base", "acme/new@1", "two"]
            mixed = await own.infer({"pixels": PIXELS}, tasks=names)
            rows = local.run({"pixels": PIXELS}, tasks=["two", "base", "new", "two"])
            assert mixed.keys() == rows.keys()
            for name, value in rows.items():
                for index in range(4):
                    np.testing.assert_allclose(mixed[name][index], value[index], rtol=1e-5, atol=1e-6)

    run(conv_bundle, blobs, work)


def test_rows_on_several_replicas_come_back_in_their_order(conv_bundle: Bundle, blobs: Blobs) -> None:
    """Each adapter is resident on another replica only, so that a split is cheapest."""

    async def work(own: RemoteRuntime, replicas: LocalReplicas) -> None:
        keys = [f"acme/t{seed}@1" for seed in range(12)]
        for seed, key in enumerate(keys):
            registered(own, blobs, key, seed)
        for key in keys:
            await own.infer({"pixels": PIXELS[:1]}, key)
        replicas.report()
        replicas.log.clear()
        many = np.repeat(PIXELS[:1], len(keys), axis=0)
        mixed = await own.infer({"pixels": many}, tasks=keys)
        assert {name for name, _ in replicas.log} == {"r0", "r1"}
        for row, key in enumerate(keys):
            alone = await own.infer({"pixels": PIXELS[:1]}, key)
            for name, value in alone.items():
                np.testing.assert_allclose(mixed[name][row], value[0], rtol=1e-5, atol=1e-6)

    run(conv_bundle, blobs, work)


def test_a_lost_replica_costs_an_inference_nothing(conv_bundle: Bundle, blobs: Blobs) -> None:
    async def work(own: RemoteRuntime, replicas: LocalReplicas) -> None:
        before = await own.infer({"pixels": PIXELS}, "two")
        dead = replicas.log[-1][0]
        replicas.dead.add(dead)
        after = await own.infer({"pixels": PIXELS}, "two")
        assert [name for name, method in replicas.log if method == "infer"][-2:] == [dead, *{"r0", "r1"} - {dead}]
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6)
        replicas.dead |= {"r0", "r1"}
        with pytest.raises(Unavailable):
            await own.infer({"pixels": PIXELS}, "two")
        replicas.report()
        with pytest.raises(Unavailable, match="no replica is running"):
            await own.infer({"pixels": PIXELS}, "two")

    run(conv_bundle, blobs, work)


def test_errors_are_those_of_a_local_runtime(conv_bundle: Bundle, blobs: Blobs) -> None:
    async def work(own: RemoteRuntime, replicas: LocalReplicas) -> None:
        calls = len(replicas.log)
        with pytest.raises(UnknownTask):
            await own.infer({"pixels": PIXELS}, "acme/none@1")
        with pytest.raises(InputError):
            await own.infer({"pixels": PIXELS[:, :, 0]}, "two")
        with pytest.raises(InputError, match="tasks"):
            await own.infer({"pixels": PIXELS}, tasks=["two"])
        assert len(replicas.log) == calls
        own.register({"acme/lost@1": Source("0" * 64, lambda: Adapter({}))})
        with pytest.raises(Exception, match="its file, with digest 000000000000"):
            await own.infer({"pixels": PIXELS}, "acme/lost@1")
        registered(own, blobs, "acme/new@1")
        own.forget(["acme/new@1"])
        with pytest.raises(UnknownTask):
            await own.infer({"pixels": PIXELS}, "acme/new@1")

    run(conv_bundle, blobs, work)


def test_calls_that_block_reach_a_replica(conv_bundle: Bundle, blobs: Blobs) -> None:
    async def work(own: RemoteRuntime, replicas: LocalReplicas) -> None:
        registered(own, blobs, "acme/new@1")
        assert await asyncio.to_thread(own.probe, "acme/new@1") is True
        assert await asyncio.to_thread(own.labels, "two") is None
        await asyncio.wrap_future(own.prefetch(["acme/new@1"]))
        assert own.residency(["acme/new@1", "base", "none"]) == {"acme/new@1": "device"}
        replicas.report()
        assert own.usage()["rows_taken"] >= 1
        assert own.batching().waiting_rows == 0
        assert own.generation() is None
        assert own.provider == "cpu"

    run(conv_bundle, blobs, work)


def test_pins_follow_replicas_that_come_and_go(conv_bundle: Bundle, blobs: Blobs) -> None:
    async def work(own: RemoteRuntime, replicas: LocalReplicas) -> None:
        registered(own, blobs, "acme/new@1")
        replicas.table.update({"r0": Figures()})
        await asyncio.to_thread(own.pin, "acme/new@1")
        assert own.pins() == {"acme/new@1": False}
        assert [len(replicas.replicas[name].runtime.pins()) for name in ("r0", "r1")] == [1, 0]
        replicas.table.update({"r0": Figures(), "r1": Figures()})
        async with asyncio.timeout(120):
            while not replicas.replicas["r1"].runtime.pins():
                await asyncio.sleep(0.002)
        await asyncio.to_thread(own.unpin, "acme/new@1")
        assert not own.pins()
        assert [len(replicas.replicas[name].runtime.pins()) for name in ("r0", "r1")] == [0, 0]

    run(conv_bundle, blobs, work)


def test_a_new_replica_is_brought_what_is_in_demand(conv_bundle: Bundle, blobs: Blobs) -> None:
    async def work(own: RemoteRuntime, replicas: LocalReplicas) -> None:
        registered(own, blobs, "acme/new@1")
        replicas.table.update({"r0": Figures()})
        await own.infer({"pixels": PIXELS}, "acme/new@1")
        await own.infer({"pixels": PIXELS}, "two")
        assert replicas.replicas["r1"].runtime.usage()["rows_taken"] == 0
        replicas.table.update({"r0": Figures(), "r1": Figures()})
        async with asyncio.timeout(120):
            while replicas.replicas["r1"].runtime.usage()["rows_taken"] < 2:
                await asyncio.sleep(0.002)

    run(conv_bundle, blobs, work)


def test_it_has_what_the_server_calls() -> None:
    """Every use of a runtime in the server, against the methods and arguments of both classes."""
    used = set()
    for file in (ROOT / "runtime" / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name in {"_runtime", "runtime"}:
                    used.add(node.attr)
    assert {"infer", "pin", "probe", "start"} <= used
    for name in used:
        theirs, own = getattr(Runtime, name, None), getattr(RemoteRuntime, name, None)
        assert own is not None, f"RemoteRuntime has no {name}"
        if callable(theirs):
            assert [*inspect.signature(own).parameters] == [*inspect.signature(theirs).parameters], name


def test_replicas_that_change_while_the_loop_ends_leave_no_coroutine(
    conv_bundle: Bundle, recwarn: pytest.WarningsRecorder
) -> None:
    async def never(*_: object) -> None:
        raise AssertionError("no replica is called")

    table = ReplicaTable()
    loop = asyncio.new_event_loop()
    calls = cast(ReplicaCalls, SimpleNamespace(call=never))
    runtime = RemoteRuntime(conv_bundle, calls, table, lambda _: Quota(), loop)
    table.update({"r0": None})  # the loop runs no more
    loop.close()
    table.update({"r1": None})
    del runtime
    gc.collect()
    assert not [own for own in recwarn if "never awaited" in str(own.message)]

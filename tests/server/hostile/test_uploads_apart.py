"""Uploads that would stop a server, before the real readers: each ends in a refusal, and stops nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.hostile_server.apart import ACTS, ATTACKS, OF, Observed, act, safetensors, send, sent, staged
from tests.helpers.server.asking import Asking
from tests.helpers.server.processes import server
from tests.helpers.waiting import wait_until
from tests.server.conftest import serve, upload
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import AdapterError, FormatError, ProtocolError, QuotaExceeded, Unavailable
from tpeft_deploy.runtime.server.isolation import reader
from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits
from tpeft_deploy.runtime.server.isolation.pool import Pool
from tpeft_deploy.runtime.server.registry import open_keys

LIMITS = ParsingLimits(
    cpu_seconds=1, wall_seconds=250, memory_bytes=256 << 20, result_bytes=8 << 20, waiting=4, tenant_waiting=2
)
ACTED = {
    "break_bundle": "of a kind that no reader knows (IntegrityError)",
    "stumble": "of a kind that no reader knows (IndexError)",
    "allocate": "at most 268,435,456 bytes of memory",
    "spin": "at most 1 s of processor time",
    "crash": "its process ended with signal 11",
    "garbage": "names and digests of at most",
    "empty": "left no result",
    "refuse_with_garbage": "left no result",
    "refuse_as_another": "a b",
    "link": "left no result",
    "pipe": "left no result",
    "flood": "left no result",
    "head": "names and digests of at most",
    "kill_reader": "its process ended",
    "open_files": "its process ended with status 4",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("acts") / "acts.py"
    place.write_text(ACTS)
    return place


@pytest.fixture(scope="module")
def observed() -> Observed:
    return Observed()


@pytest.fixture(scope="module")
def pool(conv_bundle: Bundle, program: Path, observed: Observed) -> Iterator[Pool]:
    with contextlib.closing(Pool(conv_bundle, LIMITS, program=program, observe=observed.append)) as own:
        yield own
        observed.check(LIMITS)


def good(adapter: Adapter) -> dict[str, bytes]:
    return {"weights": adapter.to_bytes()}


def check_serves(pool: Pool, adapter: Adapter) -> None:
    found = sent(pool, good(adapter), "rival")
    assert isinstance(found, Adapter)
    assert found.to_bytes() == adapter.to_bytes()
    assert found.source == OF


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_the_next_upload_is_read(pool: Pool, name: str, others: list[Adapter]) -> None:
    refused = sent(pool, ATTACKS[name])
    # Where patterns match in time, nothing is wrong with them.
    assert isinstance(refused, AdapterError) or name in {"many patterns", "feedforward_modules"}
    check_serves(pool, others[0])


@pytest.mark.parametrize("name", ACTED)
def test_whatever_a_reader_does_is_a_refusal(pool: Pool, name: str, others: list[Adapter]) -> None:
    refused = sent(pool, act(name))
    assert type(refused) is AdapterError
    assert ACTED[name] in str(refused)
    check_serves(pool, others[0])


def test_a_reader_writes_no_more_than_a_result_may_have(pool: Pool) -> None:
    with staged(act("write")) as place:
        with pytest.raises(AdapterError):
            asyncio.run(pool.read("acme", place, OF))
        assert sum(file.stat().st_size for file in place.iterdir()) <= LIMITS.result_bytes + 1000


def test_a_machine_without_processes_is_not_the_uploads_fault(
    conv_bundle: Bundle, program: Path, others: list[Adapter]
) -> None:
    full = program.with_name("full.py")
    full.write_text(f"import errno, os\n\ndef fork():\n    raise OSError(errno.EAGAIN, 'no')\n\nos.fork = fork\n{ACTS}")
    with contextlib.closing(Pool(conv_bundle, replace(LIMITS, readers=1), program=full)) as own:
        assert isinstance(sent(own, good(others[0])), Unavailable)
    gone = program.with_name("gone.py")
    with contextlib.closing(Pool(conv_bundle, replace(LIMITS, readers=1), program=gone)) as own:
        assert isinstance(sent(own, good(others[0])), Unavailable)


def test_an_upload_that_waits_is_ended_by_the_clock(conv_bundle: Bundle, program: Path, others: list[Adapter]) -> None:
    limits = replace(LIMITS, wall_seconds=0.05, readers=1)
    with contextlib.closing(Pool(conv_bundle, limits, program=program)) as own:
        assert "at most 0.05 s to read it" in str(sent(own, act("wait")))
        readers = own.pids()
        assert "at most 0.05 s to read it" in str(sent(own, act("wait")))
        assert own.pids() == readers, "ended is the upload's process, not the reader"


@pytest.mark.parametrize("whole", [False, True])
def test_processes_that_are_killed_from_outside(pool: Pool, whole: bool, others: list[Adapter]) -> None:
    async def killed() -> None:
        with staged(act("wait")) as place:
            reading = asyncio.create_task(pool.read("acme", place, OF))
            pid = await asyncio.to_thread(_pid, place)
            os.kill(_parent(pid) if whole else pid, signal.SIGKILL)
            with pytest.raises(AdapterError, match="its process ended"):
                await reading
            wait_until(lambda: not _alive(pid), "the upload's process ends with its reader")

    asyncio.run(killed())
    check_serves(pool, others[0])


def test_a_reader_that_ended_while_idle_is_replaced_unseen(
    conv_bundle: Bundle, program: Path, others: list[Adapter]
) -> None:
    with contextlib.closing(Pool(conv_bundle, replace(LIMITS, readers=1), program=program)) as own:
        check_serves(own, others[0])
        (pid,) = own.pids()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not _alive(pid), "it ends")
        check_serves(own, others[0])
        assert own.pids() != [pid]


def test_a_tenant_holds_neither_all_readers_nor_all_places(pool: Pool, others: list[Adapter]) -> None:
    async def crowd() -> None:
        with staged(act("wait")) as place:
            reading = asyncio.create_task(pool.read("acme", place, OF))
            await asyncio.to_thread(_pid, place)
            waiting = [asyncio.create_task(send(pool, good(others[0]))) for _ in range(LIMITS.tenant_waiting)]
            await asyncio.sleep(0)
            with pytest.raises(QuotaExceeded) as refused:
                pool.check_room("acme")
            assert refused.value.retry_after
            assert isinstance(await send(pool, good(others[0])), QuotaExceeded)
            for _ in range(3):
                assert isinstance(await send(pool, good(others[1]), "rival"), Adapter)
            assert not any(task.done() for task in waiting)
            waiting[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting[0]
            pool.check_room("acme")  # its place is free
            reading.cancel()  # the client hangs up
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert isinstance(await waiting[1], Adapter)

    asyncio.run(crowd())


def test_places_are_bounded_for_all_tenants_together(conv_bundle: Bundle, program: Path) -> None:
    own = Pool(conv_bundle, replace(LIMITS, readers=1), program=program)

    async def crowd() -> None:
        with staged(act("wait")) as place:
            first = asyncio.create_task(own.read("a", place, OF))
            await asyncio.to_thread(_pid, place)
            waiting = [asyncio.create_task(own.read(tenant, place, OF)) for tenant in "bcde"]
            await asyncio.sleep(0)
            with pytest.raises(Unavailable):
                own.check_room("f")
            await asyncio.to_thread(own.close)
            for task in [first, *waiting]:
                with pytest.raises(Unavailable, match="the server is stopping"):
                    await task
            with pytest.raises(Unavailable):
                own.check_room("f")

    asyncio.run(crowd())


def test_tenants_take_turns(conv_bundle: Bundle, program: Path, others: list[Adapter]) -> None:
    own = Pool(conv_bundle, replace(LIMITS, readers=1, waiting=9, tenant_waiting=9), program=program)
    order: list[str] = []

    async def one(tenant: str) -> None:
        assert isinstance(await send(own, good(others[0]), tenant), Adapter)
        order.append(tenant)

    async def crowd() -> None:
        with staged(act("wait")) as place:
            first = asyncio.create_task(own.read("a", place, OF))
            await asyncio.to_thread(_pid, place)
            waiting = [asyncio.create_task(one(tenant)) for tenant in "aaabbc"]
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(*waiting)

    with contextlib.closing(own):
        asyncio.run(crowd())
    assert order == list("abcaba")


def test_registering_is_refused_with_400_and_leaves_nothing(
    conv_bundle: Bundle, pool: Pool, tmp_path: Path, others: list[Adapter]
) -> None:
    own = serve(conv_bundle, tmp_path / "state", reader=pool)
    try:
        for parts, kind in ((ATTACKS["rank claimed"], AdapterError), (act("crash"), AdapterError)):
            with pytest.raises(kind):
                asyncio.run(own.service.register(own.who(), "mood", upload(**parts)))
        with pytest.raises(ProtocolError, match="expected a part 'weights'"):
            asyncio.run(own.service.register(own.who(), "mood", upload(config=b"{}")))
        with pytest.raises(FormatError):
            asyncio.run(own.service.register(own.who(), "mood", upload(weights=safetensors({"x": (2, 2)}))))
        assert not list((tmp_path / "state" / "incoming").glob("*"))
        assert own.state.tasks.usage("acme") == (0, 0)
        shown = asyncio.run(own.service.register(own.who(), "mood", upload(**good(others[0]))))
        assert shown["versions"][0]["version"] == "1"
    finally:
        own.runtime.close()
        own.state.close()


def test_a_reader_has_nothing_of_the_servers_environment(
    conv_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "shows.py"
    program.write_text(
        "import os, sys\n"
        f"open({str(tmp_path / 'environment')!r}, 'w').write(repr(dict(os.environ)))\n"
        f"open({str(tmp_path / 'modules')!r}, 'w').write(repr(os.listdir('/proc/self/fd')))\n"
        "sys.stdout.write('ready\\n')\n"
        "sys.stdout.flush()\n"
        "sys.stdin.read()\n"
    )
    monkeypatch.setenv("TPEFT_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with contextlib.closing(Pool(conv_bundle, replace(LIMITS, readers=1), program=program)) as own:
        wait_until(lambda: own._idle, "it starts")
    assert "secret" not in (tmp_path / "environment").read_text()
    assert (tmp_path / "modules").read_text().count(",") == 4  # standard streams, this file, and the listing itself


def test_a_reader_imports_nothing_that_it_does_not_need(conv_bundle: Bundle, tmp_path: Path) -> None:
    program = tmp_path / "modules.py"
    program.write_text(f"""
import runpy, sys
names = runpy.run_path({reader.__file__!r}, run_name="reader")
open({str(tmp_path / "modules")!r}, "w").write(" ".join(sys.modules))
names["main"](int(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]))
""")
    with contextlib.closing(Pool(conv_bundle, replace(LIMITS, readers=1), program=program)) as own:
        wait_until(lambda: own._idle, "it starts")
    found = (tmp_path / "modules").read_text().split()
    foreign = {"torch", "onnx", "onnxruntime", "uvicorn", "sqlalchemy", "pydantic", "grpc", "tpeft_deploy.runtime"}
    assert not foreign & set(found)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)])
def test_no_reader_outlives_its_server(
    conv_bundle: Bundle,
    program: Path,
    tmp_path: Path,
    others: list[Adapter],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    monkeypatch.setenv("TPEFT_DRAIN_SECONDS", "100ms")
    state = tmp_path / "state"
    keys, database = open_keys(state)
    made = {("acme", "deploy"): keys.create("acme", "deploy", by="a test")[1]}
    database.close()
    acts = (
        "from tpeft_deploy.runtime.server.isolation import reader\n"
        f"reader.__file__ = {str(program)!r}\n"
        "from tpeft_deploy.cli import main\n"
        "main()\n"
    )
    options = [conv_bundle.path, "--state", state, "--port", 0, "--threads", 1]
    with server(*options, code=acts) as (process, url), ThreadPoolExecutor(1) as threads:
        asking = Asking(int(url.rpartition(":")[2]), made)
        wait_until(lambda: len(_children(process.pid)) == 2, "its readers start")
        assert asking.register(others[0]).status_code == 200
        attack = threads.submit(
            asking.ask, "POST", "/v2/registry/tasks/slow/versions", files={"weights": act("wait")["weights"]}
        )
        readers = _children(process.pid)
        wait_until(lambda: any(map(_children, readers)), "an upload is read")
        all_of_them = [*readers, *(fork for own in readers for fork in _children(own))]
        process.send_signal(number)
        assert process.wait(100) == code
        wait_until(lambda: not any(map(_alive, all_of_them)), "no child is left")
        assert attack.exception() is not None or attack.result().status_code == 503


def test_the_memory_of_the_server_does_not_grow(pool: Pool) -> None:
    before = _peak()
    for name in ("allocate", "garbage", "write", "head"):
        sent(pool, act(name))
    sent(pool, ATTACKS["rank claimed"])
    assert _peak() - before < LIMITS.memory_bytes // 4


def test_many_small_uploads_through_all_readers(pool: Pool, others: list[Adapter]) -> None:
    async def all_of_them() -> None:
        places = asyncio.Semaphore(2)

        async def one(n: int) -> None:
            async with places:
                found = await send(pool, good(others[n % 3]), f"tenant {n % 2}")
            assert isinstance(found, Adapter)
            np.testing.assert_array_equal(
                found.deltas["up.weight"].core, others[n % 3].deltas["up.weight"].core, strict=True
            )

        await asyncio.gather(*map(one, range(20)))

    asyncio.run(all_of_them())


def _pid(place: Path) -> int:
    wait_until(lambda: (place / "pid").exists() and (place / "pid").read_text(), "the upload is read")
    return int((place / "pid").read_text())


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0"]


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _alive(pid: int) -> bool:
    return _stat(pid)[0] not in "XZ"


def _children(pid: int) -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(int(p.name)) == pid]


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

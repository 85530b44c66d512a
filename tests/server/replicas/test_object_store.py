"""Adapters in an object store: verified, cached under a budget, and there again after each failure."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.server.faulty_files import Clock, FaultyFiles, store_of
from tests.helpers.server.registry_subjects import adapter, add, unchecked
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS, serve
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import IntegrityError, MissingExtra, ServerError, Unavailable
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.registry.files.disk_cache import DiskCache
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore
from tpeft_deploy.runtime.server.registry.files.store import Referred
from tpeft_deploy.runtime.server.registry.files.stored_objects import open_objects
from tpeft_deploy.runtime.server.v2.messages import InferRequest, InferResponse
from tpeft_deploy.runtime.server.v2.statuses import status_of


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def referred(*digests: str) -> Referred:
    @contextmanager
    def context() -> Iterator[Set[str]]:
        yield set(digests)

    return context


@pytest.fixture
def files() -> Iterator[FaultyFiles]:
    own = FaultyFiles()
    yield own
    own.hangs.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("seed", range(8))
def test_random_faults_never_lose_or_alter_what_was_written(files: FaultyFiles, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    contents = [draw.randbytes(draw.randint(1, 400)) for _ in range(12)]
    places = [tmp_path / "one", tmp_path / "two"]
    stores = [store_of(files, place, budget=1000) for place in places]
    written: set[str] = set()
    damaged: set[tuple[int, str]] = set()  # cached files that were altered since they were last read or written
    for _ in range(150):
        index = draw.randrange(2)
        store, data = stores[index], draw.choice(contents)
        digest = digest_of(data)
        fault = draw.choice(["none", "none", "broken", "cut", "cached", "restart"])
        files.broken, files.cut = fault == "broken", int(fault == "cut")
        if fault == "restart":
            (places[index] / f".{digest}.left").write_bytes(b"half")
            stores[index] = store = store_of(files, places[index], budget=1000)
            assert not list(places[index].glob(".*"))
        elif fault == "cached" and digest in store._cache:
            (places[index] / f"{digest}.safetensors").write_bytes(data[: draw.randrange(len(data))])
            damaged.add((index, digest))
        cached, reads = digest in store._cache and (index, digest) not in damaged, draw.random() < 0.5
        try:
            if reads:
                assert store.read(digest, of="it") == data
                assert digest in written
            else:
                assert store.write(data) == digest
                written.add(digest)
            damaged.discard((index, digest))
        except Unavailable:
            assert fault in ("broken", "cut")
            assert not (cached and reads)
        except IntegrityError:
            assert digest not in written
        files.broken, files.cut = False, 0
        for own in stores:  # the breakers have been probed
            own._objects.calls._opened = None
        assert store._cache.held <= 1000
        assert {file.stem for file in places[index].iterdir()} == set(store._cache._sizes)
    for digest in written:
        for store in stores:
            assert digest_of(store.read(digest, of="it")) == digest


def test_what_is_cached_is_served_without_the_store(files: FaultyFiles, tmp_path: Path) -> None:
    one, two = store_of(files, tmp_path / "one"), store_of(files, tmp_path / "two")
    digest = one.write(b"an adapter")
    files.broken = True
    assert one.read(digest, of="it") == b"an adapter"
    for _ in range(3):
        with pytest.raises(Unavailable, match="does not answer") as refused:
            two.read(digest, of="it")
        assert "secret" not in str(refused.value)
    assert files.calls.count("get") <= 8  # the breaker is open
    with pytest.raises(Unavailable):
        one.write(b"another")
    files.broken = False


def test_a_store_that_hangs_occupies_few_threads_and_is_probed(
    files: FaultyFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, clock = store_of(files, tmp_path), Clock()
    store._objects.calls._clock = clock
    digest = digest_of(b"missing")
    files.hangs.clear()
    store._objects.calls.timeout = 0.05
    before = len(files.calls)
    for _ in range(100):
        with pytest.raises(Unavailable):
            store.read(digest, of="it")
    assert len(files.calls) == before + 1
    for _ in range(100):  # one probe at a time, which hangs too
        clock.now += 10
        with pytest.raises(Unavailable):
            store.read(digest, of="it")
    wait_until(lambda: len(files.calls) == before + 2, "the probe")
    assert sum(thread.name == "tpeft-store" for thread in threading.enumerate()) <= 2
    files.hangs.set()
    wait_until(lambda: not store._objects.calls.broken, "the end of the probe")
    store._objects.calls.timeout = 60
    assert store.write(b"missing") == digest
    assert "does not work" in caplog.text
    assert "answers again" in caplog.text


def test_hanging_calls_never_take_more_than_their_threads(files: FaultyFiles, tmp_path: Path) -> None:
    calls = store_of(files, tmp_path)._objects.calls
    calls.timeout = 0.001
    files.hangs.clear()
    for _ in range(40):
        calls._opened = None
        with pytest.raises(Unavailable):
            calls.call("read it", files.info, "/root/identity")
    assert sum(thread.name == "tpeft-store" for thread in threading.enumerate()) == 16
    files.hangs.set()
    wait_until(lambda: not any(thread.name == "tpeft-store" for thread in threading.enumerate()), "the end of threads")


def test_errors_are_logged_without_credentials(
    files: FaultyFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(files, tmp_path)
    files.broken = True
    with pytest.raises(Unavailable):
        store.write(b"an adapter")
    assert "no route to https://***@store" in caplog.text
    assert "secret" not in caplog.text


def test_an_altered_object_is_an_error_until_it_is_written_again(files: FaultyFiles, tmp_path: Path) -> None:
    one, two = store_of(files, tmp_path / "one"), store_of(files, tmp_path / "two")
    digest = one.write(b"an adapter")
    files.flip(digest)
    assert one.read(digest, of="it") == b"an adapter"  # cached
    with pytest.raises(IntegrityError, match="altered bytes"):
        two.read(digest, of="it")
    one.write(b"an adapter")
    assert two.read(digest, of="it") == b"an adapter"
    puts = files.calls.count("put")
    two.write(b"an adapter")
    assert files.calls.count("put") == puts  # what is intact is not written again
    with pytest.raises(IntegrityError, match="got none"):
        two.read(digest_of(b"never"), of="it")


def test_objects_are_read_in_parts(files: FaultyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpeft_deploy.runtime.server.registry.files.stored_objects._CHUNK", 4)
    for size in range(1, 13):
        one, two = store_of(files, tmp_path / "one"), store_of(files, tmp_path / f"two-{size}")
        data = bytes(range(size))
        assert two.read(one.write(data), of="it") == data


def test_readers_of_one_digest_fetch_once(tmp_path: Path) -> None:
    cache, data, fetching = DiskCache(tmp_path, 100), b"an adapter", threading.Event()
    go, fetched = threading.Event(), []

    def fetch() -> bytes:
        fetched.append(1)
        fetching.set()
        go.wait()
        return data

    with ThreadPoolExecutor(8) as threads:
        reads = [threads.submit(cache.read, digest_of(data), fetch) for _ in range(8)]
        fetching.wait()
        other = cache.read(digest_of(b"other"), lambda: b"other")  # not blocked
        go.set()
        assert {read.result() for read in reads} == {data}
    assert other == b"other"
    assert fetched == [1]


def test_the_least_recently_read_is_evicted_across_restarts(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 30)
    contents = [bytes([n]) * 10 for n in range(5)]
    for data in contents[:3]:
        cache.put(digest_of(data), data)
    cache.read(digest_of(contents[0]), lambda: pytest.fail("a cache miss"))
    cache = DiskCache(tmp_path, 20)
    assert [digest_of(data) in cache for data in contents[:3]] == [True, False, True]
    cache._reading[digest_of(contents[2])] += 1  # it is being read
    cache.put(digest_of(contents[3]), contents[3])
    assert [digest_of(data) in cache for data in contents[:4]] == [False, False, True, True]
    cache.put(digest_of(b"x" * 31), b"x" * 31)  # larger than the budget
    assert digest_of(b"x" * 31) not in cache


def test_a_sweep_removes_what_is_unreferenced_for_an_hour(files: FaultyFiles, tmp_path: Path, clock: Clock) -> None:
    store = store_of(files, tmp_path, clock=clock)
    used, unused, fresh = (store.write(data) for data in (b"used", b"unused", b"fresh"))

    def left() -> set[str]:
        return {name[-76:-12] for name in store._objects.listing("adapters")}

    assert store.sweep(referred(used, fresh), grace=0) == 0
    clock.now = 3500
    assert store.sweep(referred(used), grace=0) == 0
    clock.now = 3601
    with store.pending(b"unused"):
        assert store.sweep(referred(used), grace=0) == 0
    assert store.sweep(referred(used), grace=0) == 0  # it was needed meanwhile
    clock.now = 7101
    assert store.sweep(referred(used), grace=0) == 1
    assert left() == {used, unused}
    assert fresh not in store._cache
    clock.now = 7202
    assert store.sweep(referred(used), grace=0) == 1
    assert left() == {used}


def test_what_another_sweep_removed_before_the_reference_is_written_again(files: FaultyFiles, tmp_path: Path) -> None:
    store = store_of(files, tmp_path)
    with store.pending(b"an adapter") as digest:
        store._objects.remove([store._name(digest)])
    assert store._objects.get(store._name(digest)) == b"an adapter"


def test_a_store_of_another_database_is_not_swept(files: FaultyFiles, tmp_path: Path) -> None:
    store = store_of(files, tmp_path)
    store.bind(2, new=False)
    with pytest.raises(ServerError, match="another database"):
        store.sweep(referred(), grace=0)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_state_keeps_its_adapters_in_the_store(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}:{tmp_path}/store"
    with open_state(tmp_path / "one", store=url) as state:
        assert not state.shared
        record = add(state)
        assert state.tasks.read(record).to_bytes() == adapter(0).to_bytes()
        assert not (tmp_path / "one" / "blobs").exists()
    for file in (tmp_path / "one" / "cache").iterdir():
        file.unlink()
    with open_state(tmp_path / "one", store=url) as state:
        assert not list((tmp_path / "one" / "cache").iterdir())  # nothing is read at the start
        assert state.tasks.read(record).to_bytes() == adapter(0).to_bytes()
        assert state.tasks.sweep() == 0
    with pytest.raises(ServerError, match="registered in, got an empty one"):
        open_state(tmp_path / "two", store=url)


def test_a_known_server_starts_without_its_store(
    tmp_path: Path, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda *_, **__: (files, "/root"))
    with open_state(tmp_path / "one", store="faulty://root") as state:
        record = add(state)
    files.broken = True
    with open_state(tmp_path / "one", store="faulty://root") as state:
        assert state.tasks.read(record).to_bytes() == adapter(0).to_bytes()
        with pytest.raises(Unavailable):
            add(state, seed=1)
        with pytest.raises(Unavailable):
            state.tasks.sweep()
        assert list(state.tasks.snapshot().own("acme", "mood").versions) == [1]  # type: ignore[union-attr]
    with pytest.raises(Unavailable):
        open_state(tmp_path / "two", store="faulty://root")


def test_a_server_answers_503_for_what_is_not_cached_alone(
    tmp_path: Path,
    files: FaultyFiles,
    conv_bundle: Bundle,
    others: list[Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda *_, **__: (files, "/root"))
    with open_state(tmp_path, store="faulty://root") as state:
        records = [
            state.tasks.add("acme", name, own, unchecked, by="a key")
            for name, own in zip(("mood", "tone"), others, strict=False)
        ]
    (tmp_path / "cache" / f"{records[1].digest}.safetensors").unlink()
    with open_state(tmp_path, store="faulty://root") as state:
        calls = len(files.calls)
        own = serve(conv_bundle, tmp_path, state=state)
        try:
            assert len(files.calls) == calls  # no adapter is read at the start
            files.broken = True

            def infer(name: str) -> InferResponse:
                return asyncio.run(own.service.infer(own.who(), InferRequest(name, inputs={"pixels": PIXELS})))

            for _ in range(2):
                with pytest.raises(Unavailable) as refused:
                    infer("tone")
                status = status_of(refused.value)
                assert (status.http, status.retry_after) == (503, 1)
                assert infer("mood").outputs["logits"].shape
            files.broken = False
            state.tasks._blobs._objects.calls._opened = None  # type: ignore[attr-defined]  # as a probe does
            assert infer("tone").outputs["logits"].shape
        finally:
            own.runtime.close()


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("/a/path", ServerError, "got one without a scheme"),
        ("nosuch://user:secret@host/x", ServerError, "a URL that fsspec's driver for nosuch: takes"),
        ("dropbox://user:secret@host/x", MissingExtra, "fsspec's driver for dropbox:, got none"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        open_objects(url, 10)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_store_without_its_bucket_is_one_line(
    files: FaultyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(files, "pipe_file", missing)
    with pytest.raises(Unavailable, match=r"expected the bucket or folder of store_url, got none\. The operator"):
        store_of(files, tmp_path).write(b"bytes")


def test_names_are_those_of_the_contract(files: FaultyFiles, tmp_path: Path) -> None:
    store: ObjectStore = store_of(files, tmp_path)
    digest = store.write(b"an adapter")
    assert list(store._objects.listing("adapters")) == [f"adapters/{digest[:2]}/{digest}.safetensors"]
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.read("../identity", of="it")

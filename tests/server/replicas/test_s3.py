"""Adapters behind an S3 API: whichever process is killed, no acknowledged version is lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster_packages import needs
from tests.helpers.server.registry_subjects import adapter, add
from tests.helpers.server.s3 import S3
from tests.helpers.waiting import wait_until
from tpeft_deploy.errors import Unavailable
from tpeft_deploy.runtime.server.registry import State, VersionRecord, open_state
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore

pytestmark = [pytest.mark.cluster, needs("s3fs", "moto")]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    own = S3(tmp_path)
    for name, value in own.environment.items():
        monkeypatch.setenv(name, value)
    own.start()
    yield own
    own.kill()


def test_a_store_in_s3_is_written_read_listed_and_swept(s3: S3, tmp_path: Path) -> None:
    with open_state(tmp_path / "one", store=s3.bucket("adapters-of-a-server") + "/folder") as state:
        records = [add(state, seed=seed) for seed in range(3)]
        store = objects(state)
        store._cache.retain(lambda _: False)
        for seed, record in enumerate(records):
            assert state.tasks.read(record).to_bytes() == adapter(seed).to_bytes()
        state.tasks.remove_version("acme", "mood", 1, by="a key")
        assert state.tasks.sweep() == 0
        store._clock = lambda: time.monotonic() + 4000
        assert state.tasks.sweep() == 1
        assert {name[-76:-12] for name in store._objects.listing("adapters")} == {
            record.digest for record in records[1:]
        }
        s3.kill()
        store._cache.retain(lambda digest: digest == records[1].digest)
        state.tasks.read(records[1])
        with pytest.raises(Unavailable):
            state.tasks.read(records[2])
        s3.start()
        wait_until(lambda: read(state, records[2]), "the store that is there again")


def objects(state: State) -> ObjectStore:
    store = state.tasks._blobs
    assert isinstance(store, ObjectStore)
    return store


def read(state: State, record: VersionRecord) -> bool:
    try:
        state.tasks.read(record)
    except Unavailable:
        return False
    return True


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_kills_of_the_server_and_the_store_lose_no_acknowledged_version(s3: S3, tmp_path: Path, kills: int) -> None:
    place, url = tmp_path / "state", s3.bucket("kills")
    acknowledged: set[tuple[str, int, str]] = set()
    for seed in range(kills):
        draw = random.Random(seed)
        code = "from pathlib import Path; from tests.helpers.server.s3 import register; "
        code += f"register(Path({str(place)!r}), {url!r})"
        victim = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        assert json.loads(victim.stdout.readline()) == "ready"
        lines: list[str] = []
        reader = threading.Thread(target=lambda lines=lines, out=victim.stdout: lines.extend(out))
        reader.start()
        wait_until(lambda lines=lines: len(lines) >= 3, "three registrations")  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.2))  # at any moment of what goes on
        if seed % 2:
            s3.kill()
            s3.start()
            time.sleep(draw.uniform(0, 0.2))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        reader.join()
        victim.stdout.close()
        acknowledged |= {tuple(json.loads(line)) for line in lines if line.endswith("\n")}
        with open_state(place, store=url) as state:
            versions = {(own.task, own.number, own.digest): own for own in state.tasks.snapshot().versions()}
            assert acknowledged <= versions.keys()
            objects(state)._cache.retain(lambda _: False)
            for record in versions.values():
                objects(state).read(record.digest, of="it")
            assert not list((place / "incoming").iterdir())
            assert not list((place / "cache").glob(".*"))
    print(f"{kills} kills: {len(acknowledged)} acknowledged versions")
    assert len(acknowledged) >= 3 * kills

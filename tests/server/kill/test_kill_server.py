"""SIGKILL of a server under load: what was acknowledged is there, nothing is half, no answer is by a wrong adapter."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import nets
from tests.helpers.server.acknowledged import Log, everything_is_as_acknowledged, make_keys
from tests.helpers.server.load import Expected, Load, digest_of
from tests.helpers.server.processes import begin, server
from tpeft_deploy import Bundle


@pytest.fixture(scope="module")
def uploads() -> dict[str, bytes]:
    """Digest -> file, of adapters that the bundle does not have."""
    module = nets.conv_net()[0]
    targets = {"up.weight": (4, 4), "stem.weight": (2, 1, 2, 2)}
    made = [nets.adapter_for(module, targets, seed=10 * n) for n in range(5)]
    return {digest_of(adapter.to_bytes()): adapter.to_bytes() for adapter in made}


@pytest.fixture(scope="module")
def expected(conv_bundle: Bundle, uploads: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected.of(conv_bundle, uploads, tmp_path_factory.mktemp("uploads"))


LONG = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("kills", "url"),
    [(3, "sqlite"), pytest.param(50, "sqlite", marks=LONG), pytest.param(25, "postgresql", marks=LONG)],
    indirect=["url"],
)
def test_a_server_killed_under_load_loses_nothing_and_never_answers_by_a_wrong_adapter(
    conv_bundle: Bundle,
    uploads: dict[str, bytes],
    expected: Expected,
    tmp_path: Path,
    kills: int,
    url: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tmp_path / "state"
    if url is not None:
        monkeypatch.setenv("TPEFT_DATABASE_URL", url)
    load = Load(make_keys(state, url), uploads, expected, conv_bundle.manifest.name)
    options = [conv_bundle.path, "--state", state, "--port", 0, "--threads", 1, "--no-access-log"]
    log = Log(load)
    for seed in range(kills):
        choice = random.Random(seed)
        if seed % 4 == 1:
            kill_while_it_starts(options, choice)
        with server(*options) as (process, load.url):
            log.settle()
            load.judge()
            nothing_else_is_there(state, everything_is_as_acknowledged(load))
            load.over.clear()
            with ThreadPoolExecutor() as pool:
                clients = [pool.submit(client) for client in load.clients(seed)]
                load.wait(choice.randint(6, 12), choice.randint(11, 30))
                time.sleep(choice.uniform(0, 0.1))  # at any moment of what goes on
                load.over.set()
                process.kill()
                process.wait(100)
            for client in clients:
                client.result(200)
    with server(*options) as (process, load.url):
        log.settle()
        nothing_else_is_there(state, everything_is_as_acknowledged(load))
        process.terminate()
        assert process.wait(100) == 0
    figures = {"changes": load.changes, "answers": load.answers, "not found": load.missing, **log.figures}
    print(f"{kills} kills: {figures}")  # pytest -rP shows it
    assert load.changes > 5 * kills
    assert load.answers > 10 * kills


def kill_while_it_starts(options: list[object], choice: random.Random) -> None:
    process = begin(*options)
    try:
        time.sleep(choice.uniform(0.2, 1.5))
    finally:
        process.kill()
        process.communicate(timeout=100)


def nothing_else_is_there(state: Path, digests: set[str]) -> None:
    assert {file.name for file in (state / "blobs").glob("*/*")} == {f"{digest}.safetensors" for digest in digests}
    assert not list((state / "incoming").iterdir())


def test_the_model_of_a_task_knows_what_is_refused() -> None:
    """The tests above trust it."""
    from tests.helpers.server.load import Change, Task, applied

    task = Task()
    assert applied(task, Change("delete")) is None
    assert applied(task, Change("roll back")) is None
    for digest in ("a", "b"):
        found = applied(task, Change("register", digest=digest))
        assert found is not None
        task = found[0]
    assert (task.digest(""), task.digest("1"), task.digest("3"), task.digest("canary")) == ("b", "a", None, None)
    back = applied(task, Change("roll back"))
    assert back is not None
    assert back[0].digest("") == "a"
    assert applied(task, Change("delete version", number=2)) is None
    assert applied(back[0], Change("delete version", number=2)) is not None


def test_histories_say_what_a_request_may_have_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.server.load import Change, History

    moments = iter(range(1, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(moments)))
    history = History()
    assert history.begin(Change("register", digest="a"))  # at 1
    history.acknowledged()  # at 2
    assert history.begin(Change("register", digest="b"))  # at 3, and never acknowledged

    def seen(since: float, until: float) -> list[str | None]:
        return [task.digest("") for task in history.during(since, until)]

    assert seen(0, 0.5) == [None]
    assert seen(0.5, 1.5) == [None, "a"]
    assert seen(2.1, 2.9) == ["a"]
    assert seen(2.1, 3.5) == ["a", "b"]
    assert seen(8, 9) == ["a", "b"]

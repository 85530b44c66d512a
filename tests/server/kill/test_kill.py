"""SIGKILL at random moments of registering, swapping and deleting: what was acknowledged is there, nothing is half."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import nets
from tests.helpers.waiting import wait_until
from tpeft_deploy.runtime.server.registry import State, open_state

ROOT = Path(__file__).parents[3]


def change(place: Path, seed: int, url: str | None) -> None:
    """What the victim does: change after change, each said once it is acknowledged."""
    module = nets.conv_net()[0]
    adapters = [nets.adapter_for(module, {"up.weight": (2, 2)}, seed=number) for number in range(4)]
    choice = random.Random(seed)
    with open_state(place, url) as state:
        say({"ready": True})
        while True:
            name = f"task-{choice.randrange(4)}"
            kind = choice.choice(["add", "add", "point", "rollback", "remove", "key"])
            say({"begin": kind, "name": name})
            try:
                say({"done": kind, "name": name, "after": _do(state, kind, name, choice, adapters)})
            except Exception as error:
                say({"refused": type(error).__name__})


def _do(state: State, kind: str, name: str, choice: random.Random, adapters: list[Any]) -> object:
    tasks = state.tasks
    if kind == "add":
        tasks.add("acme", name, choice.choice(adapters), lambda *_: None, by="victim")
    elif kind == "point":
        tasks.point("acme", name, "canary", "current", by="victim")
    elif kind == "rollback":
        tasks.rollback("acme", name, "current", by="victim")
    elif kind == "remove":
        tasks.remove("acme", name, by="victim")
    else:
        return state.keys.create("acme", "infer", by="victim")[0].id
    return shown(state, name)


def shown(state: State, name: str) -> object:
    own = state.tasks.snapshot().own("acme", name)
    if own is None:
        return None
    return {"versions": {str(n): one.digest for n, one in own.versions.items()}, "aliases": dict(own.aliases)}


def say(document: object) -> None:
    print(json.dumps(document), flush=True)


def kill_once(place: Path, seed: int, url: str | None) -> tuple[dict[str, object], set[str], dict[str, Any] | None]:
    """What was acknowledged, by task; keys; and the change that was going on."""
    code = "from pathlib import Path; from tests.server.kill.test_kill import change; "
    code += f"change(Path({str(place)!r}), {seed}, {url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"ready": True}
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or []))
    reader.start()
    wait_until(lambda: sum('"done"' in line for line in lines) >= 3, "three changes")
    time.sleep(random.Random(seed).uniform(0, 0.3))  # at any moment of what goes on
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader.join()
    process.stdout.close()
    acknowledged: dict[str, object] = {}
    keys: set[str] = set()
    pending: dict[str, Any] | None = None
    for line in lines:
        if not line.endswith("\n"):
            break  # half a line: the pipe's end, not the registry's
        document = json.loads(line)
        if "begin" in document:
            pending = document
        else:
            pending = None
            if document.get("done") == "key":
                keys.add(document["after"])
            elif "done" in document:
                acknowledged[document["name"]] = document["after"]
    return acknowledged, keys, pending


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(tmp_path: Path, kills: int, url: str | None) -> None:
    place = tmp_path / "state"
    known: dict[str, object] = {}
    keys: set[str] = set()
    changes = 0
    for seed in range(kills):
        acknowledged, new, pending = kill_once(place, seed, url)
        changes += len(acknowledged) + len(new)
        known |= acknowledged
        keys |= new
        with open_state(place, url) as state:
            names = {f"task-{number}" for number in range(4)}
            for name in names:
                now = shown(state, name)
                if pending is None or pending["name"] != name:
                    assert now == known.get(name), f"kill {seed}, {name}"
                elif now != known.get(name):
                    assert _is_one_step(known.get(name), now, pending["begin"]), f"kill {seed}, {pending}"
                known[name] = now
            assert keys <= {record.id for record in state.keys.list()}
            keys = {record.id for record in state.keys.list()}
            digests = set()
            for record in state.tasks.snapshot().versions():
                assert state.tasks.read(record).to_bytes()
                digests.add(record.digest)
            assert {file.stem for file in (place / "blobs").glob("*/*")} == digests
            assert not list((place / "incoming").iterdir())
            registered = sum(entry.action == "register" for entry in state.audit.list(100_000))
            assert registered >= len(list(state.tasks.snapshot().versions()))
    assert changes > 2 * kills


def _is_one_step(before: Any, after: Any, kind: str) -> bool:
    """Whether the change that was going on, and no other, leads from one to the other."""
    old = before or {"versions": {}, "aliases": {}}
    new = after or {"versions": {}, "aliases": {}}
    added = set(new["versions"]) - set(old["versions"])
    if kind == "add":
        return len(added) == 1 and new["aliases"].get("current") == int(next(iter(added)))
    if kind == "remove":
        return after is None
    return bool(old["versions"] == new["versions"])

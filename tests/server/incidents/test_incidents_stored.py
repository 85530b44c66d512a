"""Incident 15, of the table in test_incidents.py, and what of 1 and 10 is about stored files: they were altered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import nets
from tests.helpers.server.audited import Audited, audited, infer_message, tree
from tests.helpers.server.incidents import ask, digest_of, logits
from tests.helpers.server.merged import close, merged
from tests.helpers.server.registry_subjects import unchecked
from tests.helpers.server.v2_bodies import tensor
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.runtime.server.registry import open_state


def alter(file: Path, how: str, outside: Path) -> None:
    """Change a stored file behind the server's back."""
    data = file.read_bytes()
    if how == "one bit":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif how == "cut":
        file.write_bytes(data[:-4])
    elif how == "gone":
        file.unlink()
    elif how == "another adapter":
        file.write_bytes((outside / "other").read_bytes())
    elif how == "a link":
        shutil.move(file, outside / file.name)
        file.symlink_to(outside / file.name)
    elif how == "a link of its folder":
        shutil.move(file.parent, outside / file.parent.name)
        file.parent.symlink_to(outside / file.parent.name)


INTERNAL = "internal error; see the server's log"
ALTERED = ["one bit", "cut", "gone", "another adapter", "a link", "a link of its folder"]


@pytest.fixture(scope="module")
def altered(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """A server that starts on files of which each but one was altered in its own way."""
    place = tmp_path_factory.mktemp("altered")
    outside = place / "outside"
    outside.mkdir()
    (outside / "other").write_bytes(subject(-1).to_bytes())
    with open_state(place / "state") as state:
        for number, _ in enumerate(["intact", *ALTERED]):
            state.tasks.add("acme", f"task-{number}", subject(number), unchecked, by="a test")
        unfit = Adapter(subject(0).deltas, {}, {"up.weight": "0" * 64})
        state.tasks.add("acme", "unfit", unfit, unchecked, by="a test")
    for number, how in enumerate(ALTERED, 1):
        digest = digest_of(subject(number))
        alter(place / "state" / "blobs" / digest[:2] / f"{digest}.safetensors", how, outside)
    kept = tree(outside)
    with audited(conv_bundle, place) as found:
        yield found
        assert tree(outside) == kept
        found.check_conduct()


def subject(number: int) -> Adapter:
    return nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=200 + number)


@pytest.mark.parametrize("number", range(1, 1 + len(ALTERED)), ids=ALTERED)
def test_incident_15_a_file_that_was_altered_never_answers(altered: Audited, number: int) -> None:
    name = f"task-{number}"
    for _ in range(2):
        answer = ask(altered, name)
        assert (answer.status_code, answer.json()["error"]) == (500, INTERNAL)
        assert altered.call("ModelInfer", infer_message(name)).status == "INTERNAL"
        names = {"name": "adapter", "shape": [4], "datatype": "BYTES", "data": ["base", name, "task-0", "base"]}
        assert altered.ask("POST", "/v2/models/conv/infer", json={"inputs": [tensor(), names]}).status_code == 500
    assert f"IntegrityError: read version 1 of task '{name}'" in altered.log()
    close(logits(ask(altered, "task-0"), digest_of(subject(0))), merged(subject(0)))
    # Registered again, it is there again: the one who has it has proved what it is.
    assert altered.register(subject(number), name).status_code == 200
    close(logits(ask(altered, name), digest_of(subject(number)), "2"), merged(subject(number)))


def test_incident_1_a_link_among_the_stored_files_is_not_followed(altered: Audited) -> None:
    outside = str(altered.place / "outside")
    assert any((altered.place / "outside").iterdir())
    assert not [path for _, path, _ in altered.did("open") if path.startswith(outside)]


def test_incident_10_what_no_longer_fits_its_base_is_not_served_as_the_base(altered: Audited) -> None:
    answer = ask(altered, "unfit")
    assert answer.status_code == 400
    assert "up.weight" in answer.text


def test_incident_15_a_file_that_is_altered_while_it_is_served(altered: Audited) -> None:
    adapter = subject(50)
    digest = digest_of(adapter)
    assert altered.register(adapter, "resident").status_code == 200
    alter(altered.state / "blobs" / digest[:2] / f"{digest}.safetensors", "one bit", altered.place)
    for _ in range(3):
        close(logits(ask(altered, "resident"), digest), merged(adapter))
    assert altered.ask("DELETE", "/v2/registry/tasks/resident").status_code == 200

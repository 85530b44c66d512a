"""Bundles of two components on disk: tasks, parts, digests and verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import components, nets
from tpeft_deploy import Adapter, Bundle, verify_bundle
from tpeft_deploy.errors import BundleError, IntegrityError, UnknownTarget


@pytest.fixture(scope="module")
def pair_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return components.two_component_bundle(tmp_path_factory.mktemp("bundles") / "pair")


@pytest.fixture
def own(pair_bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(pair_bundle.path, tmp_path / "pair")
    return Bundle.open(tmp_path / "pair")


def test_tasks_belong_to_all_components(own: Bundle) -> None:
    assert list(own.components) == ["vision", "text"]
    assert all(part.tasks == own.tasks for part in own.components.values())
    whole = own.adapter("both")
    parts = {name: part.part(whole) for name, part in own.components.items()}
    found = [set(part.deltas) for part in parts.values() if part is not None]
    assert set.union(*found) == set(whole.deltas)
    assert not set.intersection(*found)
    assert own.components["text"].feeds(own.adapter("seeing")) == {}
    for task in own.tasks:
        native, wanted = own.native(task), own.factors(task)
        assert native.keys() == wanted.keys()
        assert all(np.array_equal(native[name], wanted[name]) for name in wanted)


def test_tasks_are_added_to_and_removed_from_all_components(own: Bundle) -> None:
    model = components.pair()
    adapter = nets.adapter_for(model, {"vision.3.weight": (2, 2), "text.mix.weight": (2, 2)}, seed=7)
    digest = own.add("new", adapter)
    assert Bundle.open(own.path).tasks["new"] == digest == own.components["vision"].digest("new")
    own.remove("new")
    assert "new" not in Bundle.open(own.path).tasks
    odd = Adapter(dict(adapter.deltas) | {"text.mixed.weight": adapter.deltas["text.mix.weight"]})
    with pytest.raises(UnknownTarget, match=r"'text.mixed.weight'.*components vision, text.*Did you mean"):
        own.add("new", odd)
    with pytest.raises(BundleError, match="whole bundle"):
        own.components["vision"].add("new", adapter)
    assert not (own.path / "adapters" / "new").exists()


@pytest.mark.parametrize("file", ["manifest.json", "components/text/manifest.json"])
def test_an_edited_manifest_is_refused(own: Bundle, file: str) -> None:
    document = json.loads((own.path / file).read_text())
    (own.path / file).write_text(json.dumps(document | {"producer": "another"}))
    with pytest.raises(IntegrityError):
        Bundle.open(own.path)


def test_a_component_of_another_export_is_refused(own: Bundle) -> None:
    place = own.path / "components"
    shutil.rmtree(place / "text")
    shutil.copytree(place / "vision", place / "text")
    with pytest.raises(IntegrityError, match=r"component 'text'.*digest"):
        Bundle.open(own.path)


def test_verification_of_every_component(own: Bundle, tmp_path: Path) -> None:
    found = verify_bundle(own.path)
    forms = {check.form.partition(" ")[0] for check in found.checks}
    assert forms == {"vision", "text"}
    assert set(found.tasks) == set(own.tasks)
    assert found.to_json()["base_digest"] == own.base_digest
    assert verify_bundle(own.path, base=components.components(components.pair())).tasks.keys() == own.tasks.keys()
    data = own.path / "components" / "text" / "weights.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"weights\.data"):
        verify_bundle(own.path)

"""Bundles of two components on disk: tasks, parts, digests and verification."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.helpers import components, nets
from tests.helpers.exporters import files
from tpeft_deploy import Adapter, Bundle, Component, export_bundle, load_adapter, verify_bundle
from tpeft_deploy.bundle.split import UNREAD
from tpeft_deploy.errors import BundleError, IntegrityError, UnknownTarget
from tpeft_deploy.exporters.oracle.compare import relative_error
from tpeft_deploy.files import digest_file


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


def embed(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"states": model.mix(model.embedding(ids))}


def score(model: Any, states: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": model.out(torch.tanh(states))}


@torch.no_grad()
def test_a_tied_weight_of_two_components_is_changed_where_training_changed_it(tmp_path: Path) -> None:
    model, inputs = nets.text_net()
    given = {"embed": inputs["ids"], "score": torch.randn(2, 5, 8)}
    forwards: Any = {"embed": embed, "score": score}
    parts = {
        "embed": Component(model, {"ids": given["embed"]}, forward=embed),
        "score": Component(model, {"states": given["score"]}, forward=score),
    }
    change = nets.delta((20, 8), (2, 2), seed=5)
    tasks = {"both": ("embedding.weight", "out.weight"), "one": ("embedding.weight",)}
    adapters = {task: Adapter(dict.fromkeys(names, change)) for task, names in tasks.items()}
    bundle = export_bundle(parts, adapters, tmp_path / "tied")
    merged = copy.deepcopy(model)
    merged.get_parameter("embedding.weight").add_(torch.from_numpy(change.dense()))
    for task in tasks:
        for name, part in bundle.components.items():
            feeds = {part.manifest.inputs[0].name: given[name].numpy(), **part.native(task)}
            (found,) = files.session(part.path / "factored.onnx").run(None, feeds)
            changed = merged if task == "both" or name == "embed" else model
            (expected,) = forwards[name](changed, given[name]).values()
            assert relative_error(found, expected.numpy()) <= 1e-5, (task, name)


def test_a_weight_that_an_export_found_unread_is_left_out_of_later_adapters(
    own: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spare = "model.vision.spare.weight"
    deltas = {**own.adapter("both").deltas, spare: nets.delta((4, 4), (2, 2), seed=1)}
    file = tmp_path / "wide.safetensors"
    file.write_bytes(Adapter(deltas).to_bytes())
    with pytest.raises(UnknownTarget, match=r"model\.vision\.spare\.weight"):
        load_adapter(file, base=own)
    with pytest.raises(UnknownTarget, match=r"model\.vision\.spare\.weight.*--unused skip"):
        own.add("wide", load_adapter(file))
    digests = {}
    for name, part in own.components.items():
        manifest = replace(part.manifest, left_out={"both": {spare: UNREAD, "text.mix.weight": UNREAD}})
        (part.path / "manifest.json").write_text(manifest.to_json())
        digests[name] = digest_file(part.path / "manifest.json")
    (own.path / "manifest.json").write_text(replace(own.manifest, components=digests).to_json())
    skipping = Bundle.open(own.path)
    skipping.add("wide", load_adapter(file, base=skipping))
    sides = {"A": (2, 8), "B": (8, 2)}
    peft = {
        f"base_model.model.{module}.lora_{side}.weight": np.ones(shape, np.float32)
        for module in ("model.vision.spare", "text.mix")
        for side, shape in sides.items()
    }
    save_file(peft, tmp_path / "lora.safetensors")
    assert list(load_adapter(tmp_path / "lora.safetensors", scale=1.0, base=skipping).deltas) == [
        spare,
        "text.mix.weight",
    ]
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [spare]
    found, expected = skipping.factors("wide"), own.factors("both")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], array) for name, array in expected.items())

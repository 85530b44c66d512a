from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpeft_deploy import Adapter, load_adapter
from tpeft_deploy.composition import compose
from tpeft_deploy.formats import canonical
from tpeft_deploy.formats.read.saved import read_labels
from tpeft_deploy.labels import HeadLabels

HEAD = {"head.weight": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {"1": "b", "0": "a"}}, HeadLabels(("a", "b"))),
        ({"id2label": {0: "a"}, "problem_type": "regression"}, HeadLabels(("a",), "regression")),
        ({"problem_type": "multi_label_classification"}, HeadLabels((), "multi_label_classification")),
        ({"id2label": {"0": "a", "2": "b"}}, None),
        ({"id2label": {"0": 1}, "problem_type": "other"}, None),
        ({"id2label": {"0": "\ud800"}}, None),
        ({"id2label": ["a"], "problem_type": ["regression"]}, None),
        ({}, None),
    ],
)
def test_labels_are_those_of_a_config_or_none(config: dict[str, Any], labels: HeadLabels | None) -> None:
    assert HeadLabels.of_config(config) == labels


def test_an_adapter_keeps_its_labels_in_its_file(tmp_path: Path) -> None:
    plain = Adapter({}, HEAD)
    named = replace(plain, labels=HeadLabels(("a", "b"), "multi_label_classification"))
    file = tmp_path / canonical.FILE
    file.write_bytes(named.to_bytes())
    assert load_adapter(file).labels == named.labels
    file.write_bytes(plain.to_bytes())
    assert load_adapter(file).labels is None
    assert b"labels" not in plain.to_bytes()  # which would change the digests of adapters without
    assert compose({"a": (named, 1.0)}).labels == named.labels


def test_a_peft_directory_names_them_in_its_config_or_the_models_beside(tmp_path: Path) -> None:
    own, model = tmp_path / "adapter_config.json", tmp_path / "config.json"
    own.write_text("{}")
    assert read_labels(tmp_path) is None
    model.write_text("no JSON")
    assert read_labels(tmp_path) is None
    model.write_text(json.dumps({"id2label": {"0": "a"}}))
    assert read_labels(tmp_path) == HeadLabels(("a",))
    own.write_text(json.dumps({"id2label": {"0": "b"}}))
    assert read_labels(tmp_path) == HeadLabels(("b",))

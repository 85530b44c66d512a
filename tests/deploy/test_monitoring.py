"""Every metric that a manifest, a dashboard or an alert names is one that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.deploy.resources import DEPLOY, ROOT
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics

_NAME = re.compile(r"\btpeft_(?!deploy\b)[a-z_]+")
FILES = sorted(
    file.relative_to(DEPLOY)
    for file in DEPLOY.rglob("*")
    if file.suffix in {".yaml", ".json"} and _NAME.search(file.read_text())
)


def served() -> dict[str, str]:
    """The names in /metrics, with their types."""
    text = Metrics(1, dict, dict, lambda: 0).render().decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE))
    parts = {
        f"{name}_{part}": own
        for name, own in types.items()
        if own == "histogram"
        for part in ("bucket", "sum", "count")
    }
    return types | parts


@pytest.mark.parametrize("file", FILES, ids=str)
def test_metrics_exist(file: Path) -> None:
    text = (DEPLOY / file).read_text()
    named = set(_NAME.findall(text))
    known = served()
    assert named <= set(known)
    for name in named:
        counter = known[name] == "counter" or name.endswith(("_bucket", "_sum", "_count"))
        for match in re.finditer(rf"(\w+)\({name}\b", text):
            assert (match[1] in {"rate", "increase"}) == counter or match[1] == "label_values", match[0]


def test_all_files_are_looked_at() -> None:
    assert {
        "rules.yaml",
        "dashboard.json",
        "hpa.yaml",
        "keda.yaml",
        "prometheus-adapter.yaml",
        "endpoint-picker.yaml",
    } <= {file.name for file in FILES}


def test_the_dashboard_filters_and_names_by_labels_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "kubernetes" / "monitoring" / "dashboard.json").read_text())
    page = (ROOT / "docs" / "server.md").read_text()
    labels = {"namespace", "pod", "le"} | set(
        re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| `tpeft_\S+ \| (.*?) \|", page, re.M)))
    )
    places = set()
    for panel in dashboard["panels"]:
        places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
            for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
                assert {one.strip() for one in group.split(",")} <= labels
    assert len(places) == len(dashboard["panels"])

"""The Helm chart: its resources as Helm renders them (`make chart`), and its values against the server's settings."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.helpers.deploy.helm import CHART, rendered
from tests.helpers.deploy.resources import FIELDS, ROOT, kind_of, misplaced
from tests.helpers.deploy.started import started
from tpeft_deploy import __version__
from tpeft_deploy.runtime.server.settings import Settings

SET_BY_THE_CHART = {
    *("state", "host", "port", "grpc_port", "metrics_port", "database_url", "store_url", "tls_cert", "tls_key"),
    "no_auth",
}
EVERYTHING: dict[str, Any] = {
    "tls": {"secret": "certificate"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "registry": {"environmentSecret": "store"},
    "settings": {"drain_seconds": 120, "cuda_graphs": True, "max_delay": "7ms", "audit_rows": 1_000_000},
    "podLabels": {"team": "a"},
    "nodeSelector": {"kind": "gpu"},
}


def test_values_take_every_setting_but_those_that_follow_from_others() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    names = schema["properties"]["settings"]["propertyNames"]["enum"]
    assert names == [name for name in Settings.model_fields if name not in SET_BY_THE_CHART]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


@pytest.mark.chart
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_its_resources_fit_the_schemas(values: dict[str, Any]) -> None:
    documents, _ = rendered(values)
    kinds = [document["kind"] for document in documents]
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= set(kinds)
    for document in documents:
        if document["kind"] == "ServiceMonitor":
            assert misplaced(document["spec"], FIELDS[kind_of(document)]) == []
        else:
            kubernetes_validate.validate(document, "1.37", strict=True)
    assert ("HorizontalPodAutoscaler" in kinds) == ("ServiceMonitor" in kinds) == bool(values)
    pod = next(own for own in documents if own["kind"] == "Deployment")["spec"]
    assert ("replicas" in pod) != bool(values)


@pytest.mark.chart
def test_the_defaults_are_those_of_the_manifest() -> None:
    documents, _ = rendered({})
    manifest = next(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "servers.yaml").read_text()))
    pods = []
    for document in (manifest, next(own for own in documents if own["kind"] == "Deployment")):
        pod = document["spec"]["template"]["spec"]
        container = pod["containers"][0]
        container["env"] = sorted(container["env"], key=lambda own: str(own["name"]))
        container["ports"] = sorted(container["ports"], key=lambda own: str(own["name"]))
        for probe in (container[name] for name in container if name.endswith("Probe")):
            probe["httpGet"].pop("scheme", None)
        del pod["topologySpreadConstraints"]
        container.pop("imagePullPolicy", None)
        container.pop("envFrom", None)
        pods.append(pod)
    assert pods[0] == pods[1]


@pytest.mark.chart
def test_the_server_starts_with_what_the_values_say(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, _ = rendered(EVERYTHING)
    deployment = next(own for own in documents if own["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    settings = started(pod["containers"][0], monkeypatch)
    assert (settings.cuda_graphs, settings.max_delay, settings.audit_rows) == (True, 0.007, 1_000_000)
    assert (str(settings.tls_cert), settings.drain_seconds) == ("/tls/tls.crt", 120)
    assert pod["terminationGracePeriodSeconds"] == 140
    scheme = {pod["containers"][0][name]["httpGet"]["scheme"] for name in ("livenessProbe", "readinessProbe")}
    assert scheme == {"HTTPS"}


@pytest.mark.chart
@pytest.mark.parametrize(
    "values",
    [{"settings": {"max_row": 3}}, {"settings": {"port": 1}}, {"ports": {"http": "x"}}, {"replica": 3}],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    documents, refused = rendered(values)
    assert not documents
    assert "tpeft-deploy" in refused

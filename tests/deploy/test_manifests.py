"""The manifests of deploy/, against the definitions of their kinds and against the server that they start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from pydantic import ByteSize, TypeAdapter

from tests.helpers.deploy.kserve_models import kserve_models
from tests.helpers.deploy.resources import (
    DEPLOY,
    FIELDS,
    ROOT,
    documents,
    kind_of,
    misplaced,
    misplaced_in_model,
    pod_specs,
)
from tests.helpers.deploy.started import started
from tpeft_deploy.cli import main
from tpeft_deploy.runtime.server.rest.routes import ROUTES
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.server.tenancy.access import Action

DOCUMENTS = dict(documents())
CORE = ("v1", "apps/v1", "policy/v1", "autoscaling/v2", "networking.k8s.io/v1")
FILES = {"kustomize.config.k8s.io/v1beta1 Kustomization", "llm-d.ai/v1alpha1 EndpointPickerConfig"}
VERSION = "1.37"
KSERVE = kserve_models()


def servers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each pod with a container that runs `serve`: place, pod and container."""
    for place, document in DOCUMENTS.items():
        for pod in pod_specs(document):
            for container in pod["containers"]:
                if (container.get("args") or [""])[0] == "serve":
                    yield place, pod, container


SERVERS = {place: (pod, container) for place, pod, container in servers()}


@pytest.fixture(params=SERVERS)
def server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any], Settings]:
    """A pod, its container, and the settings that the server has in it."""
    pod, container = SERVERS[request.param]
    return pod, container, started(container, monkeypatch)


@pytest.mark.parametrize("place", [own for own, document in DOCUMENTS.items() if document["apiVersion"] in CORE])
def test_resources_of_kubernetes_fit_its_schemas(place: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[place], VERSION, strict=True)


@pytest.mark.parametrize("place", [own for own, document in DOCUMENTS.items() if document["apiVersion"] not in CORE])
def test_resources_of_extensions_have_only_fields_that_exist(place: str) -> None:
    document = DOCUMENTS[place]
    kind = kind_of(document)
    if kind.startswith("serving.kserve.io/"):
        version = kind.split("/")[1].split()[0].capitalize()
        models = (KSERVE, kubernetes.client)
        of = f"{version}{document['kind'].removeprefix('Cluster')}Spec"
        assert misplaced_in_model(document["spec"], of, models) == []
    elif kind not in FILES:
        assert misplaced(document["spec"], FIELDS[kind]) == []


def test_pods_of_a_ray_service_fit_the_schema_of_pods() -> None:
    spec = DOCUMENTS["kuberay/ray-service.yaml-0"]["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **group["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_a_misspelt_field_is_found() -> None:
    assert misplaced({"selector": {}, "endpoint": []}, FIELDS["monitoring.coreos.com/v1 ServiceMonitor"])
    spec = DOCUMENTS["kserve/serving-runtime.yaml-0"]["spec"]
    wrong = {**spec, "containers": [{**spec["containers"][0], "readynessProbe": {}}]}
    models = (KSERVE, kubernetes.client)
    assert misplaced_in_model(wrong, "V1alpha1ServingRuntimeSpec", models) == ["spec.containers[].readynessProbe"]


def test_ports_and_probes_are_those_of_the_server(
    server: tuple[dict[str, Any], dict[str, Any], Settings],
) -> None:
    _pod, container, settings = server
    assert settings.host == "0.0.0.0"
    own = {"http": settings.port, "grpc": settings.grpc_port, "metrics": settings.metrics_port}
    for port in container["ports"]:
        assert port["containerPort"] == own[port.get("name", "http")]
    health = {route.path for route in ROUTES if route.action is Action.HEALTH}
    probes = [container[name] for name in container if name.endswith("Probe")]
    assert {probe["httpGet"]["path"] for probe in probes} == health
    assert {own.get(probe["httpGet"]["port"], probe["httpGet"]["port"]) for probe in probes} == {settings.port}


def test_a_pod_lives_as_long_as_the_server_drains(
    server: tuple[dict[str, Any], dict[str, Any], Settings],
) -> None:
    pod, container, settings = server
    place = DOCUMENTS["kserve/inference-service.yaml-0"]["spec"]["predictor"]
    seconds = pod.get("terminationGracePeriodSeconds") or place["terminationGracePeriodSeconds"]
    assert seconds >= settings.drain_grace + settings.drain_seconds + 10
    assert "lifecycle" not in container  # the server waits for load balancers itself


def test_a_service_s_variables_do_not_become_settings(
    server: tuple[dict[str, Any], dict[str, Any], Settings],
) -> None:
    pod, container, _settings = server
    named = {variable["name"] for variable in container["env"]}
    assert pod.get("enableServiceLinks") is False or {"TPEFT_PORT", "TPEFT_GRPC_PORT", "TPEFT_METRICS_PORT"} <= named


def test_volumes_hold_what_the_server_writes(server: tuple[dict[str, Any], dict[str, Any], Settings]) -> None:
    pod, container, settings = server
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert {str(settings.state), "/tmp"} <= set(mounts.values())
    limit = volumes["state"].get("emptyDir", {}).get("sizeLimit")
    if limit is not None:
        staging = settings.max_staging_bytes or 4 * settings.max_upload_bytes
        room = TypeAdapter(ByteSize).validate_python(f"{limit}B")
        assert room >= settings.cache_bytes + staging


def test_the_memory_suffices_for_a_model_of_a_gibibyte(
    server: tuple[dict[str, Any], dict[str, Any], Settings],
) -> None:
    _pod, container, settings = server
    caches = (settings.host_bytes or 0) + settings.folded_bytes + (settings.kv_bytes or 2**28) + settings.prefix_bytes
    inflight = settings.max_inflight_bytes or max(16 * settings.max_body_bytes, 2**30)
    readers = settings.upload_readers * (35 * 2**20 + settings.upload_memory_bytes)
    needed = 150e6 + 2**30 + settings.device_bytes + caches + inflight + readers  # docs/security.md
    limit = TypeAdapter(ByteSize).validate_python(f"{container['resources']['limits']['memory']}B")
    assert limit >= 1.2 * needed


@pytest.mark.parametrize("place", [own for own, document in DOCUMENTS.items() if any(pod_specs(document))])
def test_containers_have_no_more_rights_than_they_need(place: str) -> None:
    for pod in pod_specs(DOCUMENTS[place]):
        for container in pod["containers"]:
            context = {**pod.get("securityContext", {}), **container["securityContext"]}
            assert context["runAsNonRoot"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("readOnlyRootFilesystem") is True or "ray" in container["name"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]


def test_selectors_and_named_ports_find_the_servers() -> None:
    deployment = DOCUMENTS["kubernetes/servers.yaml-0"]
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    found = 0
    for place, document in DOCUMENTS.items():
        spec = document.get("spec", {})
        if place.startswith(("kubernetes/postgres", "kubernetes/one-server")) or not isinstance(spec, dict):
            continue
        for selector in (spec.get("selector"), spec.get("podSelector")):
            if selector is not None:
                assert selector.get("matchLabels", selector) == labels, place
                found += 1
        for rule in spec.get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= set(ports)
        target = spec.get("scaleTargetRef")
        assert target is None or target["name"] == deployment["metadata"]["name"]
    assert found >= 6
    service = DOCUMENTS["kubernetes/servers.yaml-1"]["spec"]["ports"]
    assert {port["targetPort"]: port["port"] for port in service} == ports
    assert DOCUMENTS["llm-d/inference-pool.yaml-0"]["spec"]["targetPorts"] == [{"number": ports["http"]}]
    source = DOCUMENTS["llm-d/endpoint-picker.yaml-0"]["plugins"][0]
    assert source["parameters"]["port"] == ports["metrics"]
    monitor = DOCUMENTS["kubernetes/monitoring/service-monitor.yaml-0"]["spec"]["endpoints"][0]
    assert monitor["port"] in ports


def test_plugins_of_the_endpoint_picker_are_declared() -> None:
    document = DOCUMENTS["llm-d/endpoint-picker.yaml-0"]
    declared = {plugin["type"] for plugin in document["plugins"]}
    used = set(re.findall(r"pluginRef['\"]?: ?['\"]?([\w-]+)", str(document)))
    assert used
    assert used <= declared


def test_the_ray_service_has_what_cluster_config_prints() -> None:
    file = DEPLOY / "kuberay" / "ray-service.yaml"
    line = next(own for own in file.read_text().splitlines() if "cluster config" in own)
    done = CliRunner().invoke(main, line.split("tpeft-deploy ")[1].split())
    assert done.exit_code == 0, done.output
    assert DOCUMENTS["kuberay/ray-service.yaml-0"]["spec"]["serveConfigV2"] == done.output
    pin = re.search(r"ray\[serve\] ?== ?(\S+)", (ROOT / "pyproject.toml").read_text())
    assert pin is not None
    assert DOCUMENTS["kuberay/ray-service.yaml-0"]["spec"]["rayClusterConfig"]["rayVersion"] == pin[1].strip('"],')
    assert f"ray[serve]=={pin[1].strip(chr(34) + '],')}" in (DEPLOY / "kuberay" / "Dockerfile").read_text()


def test_kustomizations_name_files_that_exist() -> None:
    for file in DEPLOY.rglob("kustomization.yaml"):
        resources = yaml.safe_load(file.read_text())["resources"]
        assert all((file.parent / Path(name)).is_file() for name in resources)

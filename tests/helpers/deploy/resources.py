"""Fields of resources outside of Kubernetes itself, and the documents of `deploy/`.

The trees below have the fields that are used there, as version and source of each definition names them: they find a
misspelt or misplaced field, and are no full schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"

POD = "a pod template, checked as one of Kubernetes"
ANY = "any value"
_SELECTOR = {"matchLabels": ANY}
_GROUP = {"rayStartParams": ANY, "template": POD}

FIELDS: dict[str, Any] = {
    # ray-project/kuberay, ray.io_rayservices.yaml
    "ray.io/v1 RayService": {
        "serveConfigV2": ANY,
        "rayClusterConfig": {
            "rayVersion": ANY,
            "headGroupSpec": _GROUP,
            "workerGroupSpecs": [
                {**_GROUP, "groupName": ANY, "replicas": ANY, "minReplicas": ANY, "maxReplicas": ANY},
            ],
        },
    },
    # prometheus-operator, monitoring.coreos.com_servicemonitors.yaml and _prometheusrules.yaml
    "monitoring.coreos.com/v1 ServiceMonitor": {
        "selector": _SELECTOR,
        "endpoints": [{"port": ANY, "path": ANY, "interval": ANY}],
    },
    "monitoring.coreos.com/v1 PrometheusRule": {
        "groups": [
            {"name": ANY, "rules": [{"alert": ANY, "expr": ANY, "for": ANY, "labels": ANY, "annotations": ANY}]}
        ],
    },
    # gateway-api-inference-extension, inference.networking.k8s.io_inferencepools.yaml
    "inference.networking.k8s.io/v1 InferencePool": {
        "selector": _SELECTOR,
        "targetPorts": [{"number": ANY}],
        "endpointPickerRef": {"name": ANY, "port": {"number": ANY}, "failureMode": ANY},
    },
    # kedacore/keda, keda.sh_scaledobjects.yaml
    "keda.sh/v1alpha1 ScaledObject": {
        "scaleTargetRef": {"name": ANY},
        "minReplicaCount": ANY,
        "maxReplicaCount": ANY,
        "cooldownPeriod": ANY,
        "triggers": [{"type": ANY, "metricType": ANY, "metadata": ANY}],
    },
}
"""apiVersion and kind -> fields of `spec`; a list has the fields of its entries."""


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each document of the manifests, with its place; charts and values of other charts are none."""
    for file in sorted(DEPLOY.rglob("*.yaml")):
        if "helm" in file.parts or file.name == "prometheus-adapter.yaml":
            continue
        for number, document in enumerate(yaml.safe_load_all(file.read_text())):
            yield f"{file.relative_to(DEPLOY)}-{number}", document


def kind_of(document: Mapping[str, Any]) -> str:
    return f"{document['apiVersion']} {document['kind']}"


def misplaced(value: object, fields: object, place: str = "spec") -> list[str]:
    """The places of fields that a tree of fields does not have."""
    if isinstance(fields, str):
        return []
    if isinstance(fields, list):
        entries = value if isinstance(value, list) else [value]
        return [bad for entry in entries for bad in misplaced(entry, fields[0], f"{place}[]")]
    if not isinstance(value, dict) or not isinstance(fields, dict):
        return [place]
    found = [f"{place}.{name}" for name in value if name not in fields]
    return found + [
        bad for name in value if name in fields for bad in misplaced(value[name], fields[name], f"{place}.{name}")
    ]


def misplaced_in_model(value: object, of: str, models: Any, place: str = "spec") -> list[str]:
    """The places of fields that a class of an OpenAPI client does not have.

    Args:
        value: part of a document.
        of: type as the client writes it, such as `list[V1Container]`.
        models: modules with the classes, the first first.
        place: place of the part.
    """
    inner = re.fullmatch(r"(?:[Ll]ist|[Dd]ict)[\[(](?:str, ?)?(.+)[\])]", of)
    if inner is not None:
        entries = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
        return [bad for one in entries for bad in misplaced_in_model(one, inner[1], models, f"{place}[]")]
    kind = next((getattr(module, of) for module in models if hasattr(module, of)), None)
    if kind is None:  # str, int, object
        return [place] if isinstance(value, dict | list) and of != "object" else []
    if not isinstance(value, dict):
        return [] if of.endswith(("Quantity", "IntOrString")) else [place]
    types = {kind.attribute_map[name]: own for name, own in kind.openapi_types.items()}
    found = [f"{place}.{name}" for name in value if name not in types]
    return found + [
        bad
        for name in value
        if name in types
        for bad in misplaced_in_model(value[name], types[name], models, f"{place}.{name}")
    ]


def pod_specs(value: object) -> Iterator[dict[str, Any]]:
    """Each part of a document that has containers."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield value
        for inner in value.values():
            yield from pod_specs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_specs(inner)

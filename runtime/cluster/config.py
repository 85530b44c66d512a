"""The configuration of a cluster as Ray Serve and KubeRay read it."""

from __future__ import annotations

import json
from typing import Any

from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings

__all__ = ["NAME", "serve_config", "to_yaml"]

NAME = "tpeft"
"""Name of the application."""
_PATH = "tpeft_deploy.runtime.cluster.application:build"


def serve_config(cluster: ClusterSettings) -> dict[str, Any]:
    """Return the document that `serve deploy` and a RayService's `serveConfigV2` take.

    URLs of the database and the store are left out: the machines have them in their environment.

    Args:
        cluster: settings of the cluster.
    """
    settings = cluster.settings
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {"name": NAME, "route_prefix": "/", "import_path": _PATH, "args": cluster.arguments()},
        ],
    }


def to_yaml(document: object, indent: int = 0) -> str:
    """Return a document of dicts, lists and plain values as YAML."""
    space = "  " * indent
    if isinstance(document, dict) and document:
        return "".join(f"{space}{key}:{_value(value, indent)}" for key, value in document.items())
    if isinstance(document, list) and document:
        return "".join(f"{space}- {to_yaml(value, indent + 1).lstrip()}" for value in document)
    return f"{space}{json.dumps(document)}\n"


def _value(value: object, indent: int) -> str:
    if isinstance(value, dict | list) and value:
        return f"\n{to_yaml(value, indent + 1)}"
    return f" {json.dumps(value)}\n"

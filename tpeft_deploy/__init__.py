"""Deploy tensor adapters: one base model, many tasks, through ONNX Runtime.

Importing this package imports none of torch, onnx and onnxruntime: each public name is loaded when first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from tpeft_deploy.version import __version__ as __version__

if TYPE_CHECKING:
    from tpeft_deploy.adapter import Adapter
    from tpeft_deploy.bundle.directory import Bundle
    from tpeft_deploy.client import AsyncClient, Client
    from tpeft_deploy.errors import TpeftError
    from tpeft_deploy.exporters import Component, export_bundle, export_folded, verify_bundle
    from tpeft_deploy.formats import load_adapter
    from tpeft_deploy.runtime import Runtime
    from tpeft_deploy.runtime.generation import Sampling
    from tpeft_deploy.tucker import TuckerDelta

__all__ = [
    "Adapter",
    "AsyncClient",
    "Bundle",
    "Client",
    "Component",
    "Runtime",
    "Sampling",
    "TpeftError",
    "TuckerDelta",
    "export_bundle",
    "export_folded",
    "load_adapter",
    "verify_bundle",
]

# ONNX Runtime reads this once, when it is loaded, and otherwise reports model names, graph names and error messages to
# its vendor; ORT_DISABLE_TELEMETRY=0 in the environment keeps it on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Adapter": "tpeft_deploy.adapter",
    "AsyncClient": "tpeft_deploy.client",
    "Bundle": "tpeft_deploy.bundle.directory",
    "Client": "tpeft_deploy.client",
    "Component": "tpeft_deploy.exporters",
    "Runtime": "tpeft_deploy.runtime",
    "Sampling": "tpeft_deploy.runtime.generation",
    "TpeftError": "tpeft_deploy.errors",
    "TuckerDelta": "tpeft_deploy.tucker",
    "export_bundle": "tpeft_deploy.exporters",
    "export_folded": "tpeft_deploy.exporters",
    "load_adapter": "tpeft_deploy.formats",
    "verify_bundle": "tpeft_deploy.exporters",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

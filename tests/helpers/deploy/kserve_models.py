"""KServe's models of its resources."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest.mock import patch


def kserve_models() -> ModuleType:
    """Import `kserve.models` without the rest of kserve, which would register gRPC messages named as ours are."""
    spec = importlib.util.find_spec("kserve")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    bare = ModuleType("kserve")
    bare.__path__ = list(spec.submodule_search_locations)
    with patch.dict(sys.modules, {"kserve": bare}):
        return importlib.import_module("kserve.models")

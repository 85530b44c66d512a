"""Charts as Helm renders them, through its library in an environment apart (`make chart`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.deploy.resources import DEPLOY, ROOT

CHART = DEPLOY / "helm" / "tpeft-deploy"
ENVIRONMENT = Path(os.environ.get("CHART", ROOT / ".venv-chart")).resolve()
_PROGRAM = """
import json, sys
import helm_python as helm
chart, values = sys.argv[1], json.loads(sys.argv[2])
with helm.Chart.load(chart) as own:
    try:
        print(json.dumps({"files": own.render(values, name="prod", namespace="models"), "lint": helm.lint(chart)}))
    except helm.HelmError as error:
        print(json.dumps({"refused": str(error)}))
"""


def rendered(values: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The resources of the chart with these values, or why Helm refuses them."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.fail(f"no environment in {ENVIRONMENT}: run `make chart`")
    line = [str(python), "-I", "-c", _PROGRAM, str(CHART), json.dumps(values)]
    answer = json.loads(subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout)
    if "refused" in answer:
        return [], answer["refused"]
    assert answer["lint"]["errors"] == []
    loaded = [yaml.safe_load(text) for text in answer["files"].values()]
    return [document for document in loaded if document is not None], ""

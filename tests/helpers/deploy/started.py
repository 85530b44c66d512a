"""The settings of a server in a container, by the command line itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
from click.testing import CliRunner

from tests.helpers.deploy.resources import ROOT
from tpeft_deploy.cli import main
from tpeft_deploy.runtime.server.settings import Settings

SECRETS = {"database-url": "postgresql+psycopg://user@host/name", "store-url": "s3://bucket/prefix"}


def started(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Run the command line of a container with its environment, up to the server."""
    image = re.findall(r"(TPEFT_[A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text().split("FROM")[-1])
    env = dict(image)
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        env[variable["name"]] = variable["value"] if reference is None else SECRETS[reference["key"]]
    unknown = {name for name in env if name.startswith("TPEFT_")} - {
        f"TPEFT_{own.upper()}" for own in Settings.model_fields
    }
    assert not unknown
    found: list[Settings] = []
    monkeypatch.setattr("tpeft_deploy.runtime.server.main.serve", lambda _bundle, settings: found.append(settings))
    done = CliRunner().invoke(main, container["args"], env=env)
    assert done.exit_code == 0, done.output
    return found[0]

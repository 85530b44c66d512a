"""The configuration that Ray Serve reads, as the command prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tpeft_deploy.cli import main
from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
from tpeft_deploy.runtime.cluster.config import to_yaml


def test_the_command_prints_yaml_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPEFT_DATABASE_URL", "postgresql://me:secret@host/db")
    line = ["cluster", "config", str(tmp_path), "--replicas", "3", "--max-replicas", "9", "--port", "9000"]
    line += ["--database-url", "postgresql://me:secret@host/db", "--state", "/srv/state"]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0, done.output
    assert "secret" not in done.output
    found = yaml.safe_load(done.output)
    assert found["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (application,) = found["applications"]
    assert application["import_path"] == "tpeft_deploy.runtime.cluster.application:build"
    own = ClusterSettings.of(application["args"])
    assert (own.replicas, own.max_replicas, own.ingresses, own.bundle) == (3, 9, 1, str(tmp_path))
    assert own.settings.port == 9000
    assert own.settings.state == Path("/srv/state")
    assert own.settings.database_url == "postgresql://me:secret@host/db"


def test_values_survive_yaml() -> None:
    document = {"a": [{"b": "x: y", "c": {"d": 1.5, "e": None}}, "- no"], "f": [], "g": {}, "h": True, "i": "é\n'\""}
    assert yaml.safe_load(to_yaml(document)) == json.loads(json.dumps(document))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "'bundle'"),
        ({"bundle": "b", "copies": 2}, "replicas"),
        ({"bundle": "b", "replicas": 0}, "at least one replica"),
        ({"bundle": "b", "replicas": 3, "max_replicas": 2}, "max_replicas of at least 3"),
        ({"bundle": "b", "ingresses": 2}, "one ingress"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ServerError, match=said):
        ClusterSettings.of(arguments)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ServerError, match="prot"):
        _ = ClusterSettings("b", {"prot": 1}).settings

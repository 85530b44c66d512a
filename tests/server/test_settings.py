"""Flags before the environment, that before the file, that before defaults; and nothing unknown."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tpeft_deploy.cli import main
from tpeft_deploy.cli.serve import serve
from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.server.settings import Settings, read

# Another value than the default for each, as the file has it.
OTHERS: dict[str, object] = {
    "state": "elsewhere",
    "database_url": "sqlite:///x.db",
    "store_url": "memory://x",
    "cache_bytes": "7GiB",
    "store_timeout": "3s",
    "host": "::1",
    "port": 1234,
    "grpc_port": 1235,
    "metrics_port": 1236,
    "tls_cert": "cert.pem",
    "tls_key": "key.pem",
    "no_auth": True,
    "agent_models": "models",
    "agent_port": 1237,
    "agent_tenant": "kserve",
    "provider": "cpu",
    "devices": "0,2",
    "threads": 3,
    "device_bytes": "2GiB",
    "host_bytes": "3MiB",
    "folded_bytes": "4KiB",
    "kv_bytes": "5MiB",
    "max_tokens": 4096,
    "prefix_bytes": "6KiB",
    "cuda_graphs": True,
    "allow_tf32": True,
    "max_rows": 5,
    "max_delay": "7ms",
    "max_queue_rows": 9,
    "large_requests": "refuse",
    "max_request_rows": 7,
    "max_run_elements": 1000,
    "max_body_bytes": "2MiB",
    "max_grpc_bytes": "1MiB",
    "max_upload_bytes": 1000,
    "upload_readers": 3,
    "upload_queue": 12,
    "upload_cpu_seconds": "3s",
    "upload_wall_seconds": "4s",
    "upload_memory_bytes": "3GiB",
    "max_json_bytes": "1MiB",
    "max_json_upload_bytes": "6MiB",
    "max_inflight_bytes": "7MiB",
    "max_inflight_bytes_per_tenant": "3MiB",
    "max_staging_bytes": "8MiB",
    "max_staging_bytes_per_tenant": 2000,
    "max_connections": 77,
    "max_connections_per_address": 0,
    "max_requests_per_key": 11,
    "max_streams_per_key": 12,
    "head_timeout": "3s",
    "stall_timeout": "4s",
    "idle_timeout": "5s",
    "max_elements": 11,
    "requests_per_s": 1.5,
    "rows_per_s": 2,
    "tokens_per_min": 7.5,
    "queue_share": 0.25,
    "max_adapters": 13,
    "max_adapter_bytes": "5GiB",
    "max_pins": 3,
    "max_folded": 1,
    "max_folded_in_all": 4,
    "drain_seconds": "2m",
    "drain_grace": 1.5,
    "log_level": "warning",
    "access_log": False,
    "console": False,
    "metrics_for_all_keys": True,
    "max_task_series": 17,
    "changes_per_s": 3.5,
    "audit_days": 20.0,
    "audit_rows": 500,
}


def test_each_setting_comes_from_the_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(OTHERS) == list(Settings.model_fields)
    file = tmp_path / "server.toml"
    written = {name: str(value).lower() if isinstance(value, bool) else repr(value) for name, value in OTHERS.items()}
    file.write_text("".join(f"{name} = {value}\n" for name, value in written.items()))
    from_file = read(file, {})
    for name, value in OTHERS.items():
        monkeypatch.setenv(f"TPEFT_{name.upper()}", str(value))
    assert from_file.model_dump() == read(None, {}).model_dump()
    for name, field in Settings.model_fields.items():
        assert getattr(from_file, name) != field.default, name
    assert (from_file.device_bytes, from_file.max_delay, from_file.drain_seconds) == (2**31, 0.007, 120)
    assert from_file.quota.bytes == 5 * 2**30


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Settings:
    """The settings that `tpeft-deploy serve` starts the server with."""
    found: list[Settings] = []
    monkeypatch.setattr("tpeft_deploy.runtime.server.main.serve", lambda _bundle, settings: found.append(settings))
    done = CliRunner().invoke(main, ["serve", "bundle", *flags])
    assert done.exit_code == 0, done.output
    return found[0]


def test_each_flag_sets_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        one for one in serve.params if isinstance(one, click.Option) and one.name not in {"config", "debug", "quiet"}
    ]
    flags: list[str] = []
    for option in options:
        value = OTHERS[str(option.name)]
        if option.is_flag:
            flags += [(option.opts if value else option.secondary_opts)[0]]
        else:
            flags += [option.opts[0], str(value)]
    found = run(monkeypatch, *flags)
    expected = read(None, {str(option.name): OTHERS[str(option.name)] for option in options})
    assert found == expected


def test_flags_that_are_not_given_leave_the_file_and_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.toml"
    file.write_text("access_log = false\nno_auth = true\nport = 1\nthreads = 1\n")
    monkeypatch.setenv("TPEFT_THREADS", "2")
    found = run(monkeypatch, "--config", str(file), "--port", "3")
    assert (found.access_log, found.no_auth, found.port, found.threads) == (False, True, 3, 2)
    assert run(monkeypatch, "--config", str(file), "--access-log").access_log


def test_an_unknown_name_in_the_file_ends_the_command_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1\ndrain_second = 3\n")
    done = CliRunner().invoke(main, ["serve", "bundle", "--config", str(file)])
    assert done.exit_code == 1
    assert "'drain_second'" in done.output
    assert done.output.count("\n") == 1
    missing = CliRunner().invoke(main, ["serve", "bundle", "--config", str(tmp_path / "none.toml")])
    assert missing.exit_code == 1
    assert "none.toml" in missing.output


def test_the_order_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nthreads = 1\nmax_rows = 1\nmax_body_bytes = "1MiB"\ndrain_seconds = "2m"\n')
    monkeypatch.setenv("TPEFT_PORT", "2")
    monkeypatch.setenv("TPEFT_THREADS", "2")
    found = read(file, {"port": 3})
    assert (found.port, found.threads, found.max_rows) == (3, 2, 1)
    assert found.max_body_bytes == 2**20
    assert found.drain_seconds == 120
    assert read(None, {}).max_rows is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "'prot'.*not permitted"),
        ("port = 'x'", "'port'"),
        ("port = 70000", "'port'"),
        ("devices = [0, -1]", "'devices.*'"),
        ("devices = []", "'devices'"),
        ("drain_seconds = 'soon'", "'drain_seconds'.*30s"),
        ("port =", "server.toml"),
        ("tls_cert = 'x.pem'", "together"),
        ("no_auth = true\nhost = '0.0.0.0'", "loopback"),
    ],
)
def test_what_is_wrong_is_named_on_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ServerError, match=message) as caught:
        read(file, {})
    assert "\n" not in str(caught.value)


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPEFT_DATABASE_URL", "postgresql://me:secret@host/db")
    assert "secret" not in repr(read(None, {}))


def test_batches_are_smaller_on_the_cpu() -> None:
    assert read(None, {}).batching("cpu").max_rows == 8
    assert read(None, {}).batching("cuda").max_rows == 32
    assert read(None, {"max_rows": 5}).batching("cpu").max_rows == 5


def test_every_setting_says_what_it_is() -> None:
    source = Path(__file__).parents[2].joinpath("runtime", "server", "settings.py").read_text()
    for name in Settings.model_fields:
        after = source.split(f"\n    {name}: ")[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), name

"""Flags before the environment, that before the file, that before defaults; and nothing unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.server.settings import Settings, read


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

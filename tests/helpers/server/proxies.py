"""The proxies of deploy/proxies/ as they are documented, on sockets of a directory in place of addresses."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[3]
NAMES = ("one", "two", "three")
PROXIES = ("nginx", "haproxy")
_FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
_FIRST = 11  # last number of the first server's address in the files


def documented(proxy: str) -> Path:
    """The documented file of a proxy."""
    return ROOT / "deploy" / "proxies" / _FILES[proxy]


def program(proxy: str) -> str:
    """The program of a proxy; skips the test where it is not installed."""
    found = shutil.which(proxy, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"no {proxy}: apt-get install {'nginx-light' if proxy == 'nginx' else proxy}")
    return found


def configured(proxy: str, addresses: Mapping[str, str]) -> str:
    """The documented file with other addresses, users and paths.

    Args:
        proxy: name of the proxy.
        addresses: address in the file -> address of a server, as the proxy writes it.
    """
    text = documented(proxy).read_text()
    for old, new in addresses.items():
        assert old in text
        text = text.replace(old, new)
    user = pwd.getpwuid(os.geteuid()).pw_name
    if proxy == "haproxy":
        text = re.sub(r"(?m)^    (user|group) haproxy\n", "", text)
        return re.sub(r"(?m)^    bind :(80|9000)", r"    bind unix@front-\1.sock", text)
    # What a server that comes back waits for: a shorter time, for the test to see it.
    text = text.replace("fail_timeout=10s", "fail_timeout=1s").replace("user www-data;", f"user {user};")
    text = text.replace("pid /run/nginx.pid;", "pid nginx.pid;")
    text = text.replace("worker_processes auto;", "worker_processes 2;")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"    {kind}_temp_path {kind};\n" for kind in kinds)
    text = text.replace("http {\n", f"http {{\n{paths}", 1)
    return re.sub(r"(?m)^        listen (80|9000)\b", r"        listen unix:front-\1.sock", text)


def sockets(proxy: str) -> dict[str, str]:
    """Addresses of servers on the sockets NAME.sock and NAME-grpc.sock of the proxy's directory."""
    prefix = "unix:" if proxy == "nginx" else "unix@"
    found = {f"10.0.0.{_FIRST + at}:8080": f"{prefix}{name}.sock" for at, name in enumerate(NAMES)}
    return {**found, **{f"10.0.0.{_FIRST + at}:9000": f"{prefix}{name}-grpc.sock" for at, name in enumerate(NAMES)}}


@contextmanager
def running(proxy: str, place: Path, addresses: Mapping[str, str]) -> Iterator[None]:
    """A proxy that listens on front-80.sock and front-9000.sock of a directory.

    Args:
        proxy: name of the proxy.
        place: directory, with a short path: that of a socket has at most 107 bytes.
        addresses: as for `configured`.
    """
    own, file, log = program(proxy), place / _FILES[proxy], place / f"{proxy}.log"
    file.write_text(configured(proxy, addresses))
    lines = {
        "nginx": [own, "-p", f"{place}/", "-c", str(file), "-e", "stderr", "-g", "daemon off;"],
        "haproxy": [own, "-db", "-f", str(file)],
    }
    fronts = [place / "front-80.sock", place / "front-9000.sock"]
    with log.open("w") as out:
        process = subprocess.Popen(lines[proxy], cwd=place, stdout=out, stderr=out)
    try:
        wait_until(lambda: process.poll() is not None or all(f.exists() for f in fronts), f"the start of {proxy}")
        assert process.poll() is None, f"{proxy} ended:\n{log.read_text()}"
        yield
        assert process.poll() is None, f"{proxy} ended:\n{log.read_text()}"
    finally:
        process.terminate()
        process.wait(100)

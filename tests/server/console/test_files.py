"""The console's files need no key, and are served with headers that keep a browser to this server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers.server.audited import Audited, audited
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.console.files import POLICY

STATIC = Path(__file__).parents[3] / "runtime" / "server" / "console" / "static"


@pytest.fixture
def client(server: Audited) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=server.url, timeout=100) as found:
        yield found


def test_the_page_is_served_without_a_key_and_names_only_files_of_the_server(client: httpx.Client) -> None:
    moved = client.get("/console")
    assert (moved.status_code, moved.headers["location"]) == (307, "console/")
    page = client.get("/console/")
    assert page.text == (STATIC / "index.html").read_text()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    names = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(names) == 3
    for name in names:
        file = client.get(f"/console/{name}")
        assert file.content == (STATIC / name).read_bytes()
        assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert client.get("/console/server.json").json() == {"keys": True}


@pytest.mark.parametrize("path", ["/console/", "/console/server.json"])
def test_headers(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert "default-src 'none'" in POLICY
    assert "frame-ancestors 'none'" in POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-request-id"]


def test_a_known_file_is_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/console/")
    again = client.get("/console/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/console/", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head("/console/")
    assert (head.content, head.headers["content-length"]) == (b"", str(len(first.content)))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", f"/console/{path}") for path in ("nothing", "index.html", "assets/", "../v2", "%2e%2e/files.py")],
        *[("GET", "/consoles"), ("POST", "/console/"), ("DELETE", "/console"), ("GET", "/console/assets")],
    ],
)
def test_nothing_else_is_served_without_a_key(client: httpx.Client, method: str, path: str) -> None:
    assert client.request(method, path).status_code == 401


def test_the_console_can_be_turned_off(conv_bundle: Bundle, tmp_path: Path) -> None:
    with audited(conv_bundle, tmp_path, console="false") as server:
        assert {server.client.get(path).status_code for path in ("/console", "/console/", "/console/server.json")} == {
            401
        }


def test_requests_are_logged_and_counted(server: Audited, client: httpx.Client) -> None:
    assert client.get("/console/").status_code == 200
    text = server.ask("GET", "/metrics", "operator", "admin").text
    assert 'tpeft_requests_total{code="200",protocol="http",route="/console"}' in text


def test_built_files_name_no_place_and_need_no_map() -> None:
    for file in STATIC.rglob("*.*"):
        text = file.read_text()
        assert "sourceMappingURL" not in text
        assert not re.search(r"node_modules|/home/|/work/|https?://(?!www\.w3\.org/)", text), file

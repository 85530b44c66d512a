"""If-Match, If-None-Match and ETag over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from tests.helpers.server.live import Live, serving_bundle
from tpeft_deploy import Adapter, Bundle

TASK = "/v2/registry/tasks/mood"
Lines = Sequence[tuple[str, str]]


@pytest.fixture(scope="module")
def live(conv_bundle: Bundle, others: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_bundle(conv_bundle, tmp_path_factory.mktemp("state")) as own:
        assert own.register(others[0]).status_code == 200
        yield own


def tag_of(live: Live) -> str:
    answer = live.ask("GET", TASK)
    assert answer.headers["etag"] == answer.json()["etag"]
    return str(answer.headers["etag"])


def pointed(live: Live, *lines: tuple[str, str]) -> httpx.Response:
    """Point an alias, with headers that may be repeated."""
    headers = [(name.encode(), value.encode("latin-1")) for name, value in (*live.headers().items(), *lines)]
    return live.client.put(f"{TASK}/aliases/canary", json={"version": 1}, headers=headers)


def test_each_answer_has_the_tag_of_the_task_afterwards(live: Live, others: list[Adapter]) -> None:
    upload, tags = {"weights": others[1].to_bytes()}, [tag_of(live)]
    own, latest = "/v2/registry/tasks/own", ""
    asked: list[tuple[str, str, int, dict[str, Any]]] = [
        ("POST", f"{own}/versions", 200, {"headers": {"If-None-Match": "*"}, "files": upload}),
        ("POST", f"{own}/versions", 412, {"headers": {"If-None-Match": "*"}, "files": upload}),
        ("POST", f"{own}/versions", 200, {"files": {"weights": others[2].to_bytes()}}),
        ("PUT", f"{own}/aliases/canary", 200, {"json": {"version": 1}}),
        ("POST", f"{own}/aliases/current/rollback", 200, {}),
        ("PUT", f"{own}/aliases/canary", 200, {"json": {"version": "current"}}),
        ("DELETE", f"{own}/versions/2", 200, {}),
        ("DELETE", f"{own}/versions/2", 412, {"headers": {"If-Match": tags[0]}}),
        ("POST", f"{own}/publish?tenant=acme", 412, {"headers": {"If-Match": tags[0]}}),
        ("DELETE", own, 412, {"headers": {"If-Match": tags[0]}}),
    ]
    for method, path, status, more in asked:
        who = ("operator", "admin") if "publish" in path else ("acme", "deploy")
        if latest and status == 200:
            more["headers"] = {"If-Match": latest}
        answer = live.ask(method, path, *who, **more)
        assert answer.status_code == status, answer.text
        if status == 200:
            latest = answer.headers["etag"]
            assert latest not in tags
            assert answer.json().get("etag", latest) == live.ask("GET", own).headers["etag"] == latest
            tags.append(latest)
        else:
            assert "etag" not in answer.headers
    answer = live.ask("POST", f"{own}/publish?tenant=acme", "operator", "admin", headers={"If-Match": latest})
    assert answer.status_code == 200
    assert answer.headers["etag"] == live.ask("GET", own).headers["etag"] != latest
    shared = {"headers": {"If-Match": answer.headers["etag"]}}
    gone = live.ask("DELETE", f"{own}?tenant=shared", "operator", "admin", **shared)
    assert (gone.status_code, gone.json()) == (200, {})
    assert "etag" not in gone.headers


def test_models_of_the_bundle_have_no_tag(live: Live) -> None:
    answer = live.ask("GET", "/v2/registry/tasks/base")
    assert answer.json()["etag"] is None
    assert "etag" not in answer.headers


@pytest.mark.parametrize(
    "lines",
    [
        [("If-Match", "TAG")],
        [("If-Match", "*")],
        [("if-match", '"a,b" , TAG')],
        [("If-Match", ',, "\xff",TAG,')],
        [("If-Match", '"x"'), ("If-Match", "TAG")],
        [],
    ],
)
def test_a_condition_that_is_true(live: Live, lines: Lines) -> None:
    assert pointed(live, *filled(live, lines)).status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        [("If-Match", '"x"')],
        [("If-Match", '""')],
        [("If-Match", '"x", "y,TAG"')],
        [("If-None-Match", "*")],
        [("If-None-Match", "*"), ("If-Match", "*")],
        [("If-None-Match", "*"), ("If-Match", "TAG")],
    ],
)
def test_a_condition_that_is_false(live: Live, lines: Lines) -> None:
    before = tag_of(live)
    answer = pointed(live, *filled(live, lines))
    assert answer.status_code == 412, answer.text
    assert answer.json()["error"].startswith("change task 'mood': expected ")
    assert tag_of(live) == before


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([("If-Match", "W/TAG")], "expected strong entity tags, got the weak one"),
        ([("If-Match", 'TAG, W/"x"')], "expected strong entity tags"),
        ([("If-Match", "7")], "entity tags in double quotes"),
        ([("If-Match", "")], "entity tags in double quotes"),
        ([("If-Match", ",")], "entity tags in double quotes"),
        ([("If-Match", '"7')], "entity tags in double quotes"),
        ([("If-Match", 'TAG "8"')], "entity tags in double quotes"),
        ([("If-Match", '"7 8"')], "entity tags in double quotes"),
        ([("If-Match", 'w/"7"')], "entity tags in double quotes"),
        ([("If-Match", "*, TAG")], "entity tags in double quotes"),
        ([("If-Match", "*"), ("If-Match", "*")], "entity tags in double quotes"),
        ([("If-None-Match", "TAG")], "read the header If-None-Match: expected *"),
        ([("If-None-Match", "")], "read the header If-None-Match: expected *"),
    ],
)
def test_a_malformed_condition(live: Live, lines: Lines, text: str) -> None:
    before = tag_of(live)
    answer = pointed(live, *filled(live, lines))
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]
    assert tag_of(live) == before


def test_refusals_of_the_key_come_first(live: Live) -> None:
    answer = live.client.put(f"{TASK}/aliases/canary", json={"version": 1}, headers={"If-Match": '"x"'})
    assert answer.status_code == 401
    headers = live.headers("acme", "infer") | {"If-Match": '"x"'}
    assert live.client.delete(TASK, headers=headers).status_code == 403


def filled(live: Live, lines: Lines) -> Lines:
    tag = tag_of(live)
    return [(name, value.replace('y,TAG"', f"y,{tag[1:]}").replace("TAG", tag)) for name, value in lines]

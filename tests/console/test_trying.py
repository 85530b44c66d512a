"""Requests, chats and live figures in the console, and hostile names and answers, which stay text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.helpers.console import go, said, signed_in
from tests.server.conftest import PIXELS

pytestmark = pytest.mark.console

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

    from tests.console.conftest import Opens
    from tests.helpers.server.audited import Audited

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
LONG = "\u202e\u4efb\u52a1 \U0001f469\u200d\U0001f680 \u0627\u0644\u0645\u0647\u0645\u0629 " * 40


def asked(server: Audited, task: str, pixels: Any) -> list[float]:
    tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    answer = server.ask("POST", f"/v2/models/{task}/infer", json={"inputs": [tensor]}).json()
    found: list[float] = next(own for own in answer["outputs"] if own["name"] == "logits")["data"]
    return found


def shown(page: Page, task: str) -> list[float]:
    answer = page.get_by_role("region", name=f"Answer of {task}")
    answer.get_by_role("heading", name="logits").wait_for()
    return [float(text) for text in answer.get_by_role("table").locator("td.number").all_inner_texts()]


def test_the_same_tensor_under_two_tasks(conv: Audited, opens: Opens) -> None:
    tab = opens(conv)
    page = signed_in(tab)
    page.get_by_role("link", name="mood", exact=True).click()
    page.get_by_role("region", name="mood").get_by_role("link", name="Try").click()
    page.get_by_label("Side by side").check()
    pixels = PIXELS[:2].round(3)
    page.get_by_label("JSON of pixels").fill(json.dumps(pixels.tolist()))
    page.get_by_role("button", name="Run").click()
    found = {task: shown(page, task) for task in ("mood", "base")}
    for task, values in found.items():
        np.testing.assert_allclose(values, asked(conv, task, pixels), rtol=1e-3, atol=1e-4)
    text = page.get_by_text("Largest difference from the other").first.inner_text()
    most = np.abs(np.subtract(*map(np.array, found.values()))).max()
    assert float(text.rpartition(" ")[2]) == pytest.approx(most, rel=1e-2)
    tab.accessible()


def test_an_image_is_a_tensor(conv: Audited, opens: Opens, tmp_path: Path) -> None:
    from PIL import Image

    page = signed_in(opens(conv))
    go(page, "Try")
    page.get_by_label("Values").select_option("image")
    Image.new("RGB", (28, 24), (255, 255, 255)).save(tmp_path / "white.png")
    page.locator("input[accept='image/*']").set_input_files(tmp_path / "white.png")
    page.get_by_role("img", name="The chosen image").wait_for()
    page.get_by_role("button", name="Run").click()
    expected = asked(conv, "base", np.ones((1, 1, 12, 14), np.float32))
    np.testing.assert_allclose(shown(page, "base"), expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_sent_and_what_is_refused_is_said(conv: Audited, opens: Opens) -> None:
    tab = opens(conv)
    tab.refusals = {400, 404}
    page = signed_in(tab)
    go(page, "Try")
    page.get_by_label("JSON of pixels").fill("[1, 2")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("alert").get_by_text("Input pixels is no JSON").wait_for()
    page.get_by_label("JSON of pixels").fill("[[1, 2]]")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("alert").get_by_text("Refused (400)").wait_for()
    page.get_by_label("Task").fill("nobody")
    page.get_by_label("Task").blur()
    page.get_by_role("alert").get_by_text("Refused (404)").wait_for()


def test_a_chat_with_two_tasks(talk: Audited, opens: Opens) -> None:
    tab = opens(talk)
    page = signed_in(tab)
    go(page, "Try")
    page.get_by_label("Task").fill("a")
    page.get_by_label("Side by side").check()
    page.get_by_label("Second task").fill("b")
    page.get_by_label("Tokens at most").fill("12")
    messages: dict[str, list[dict[str, str]]] = {"a": [], "b": []}
    for turn, text in enumerate(("the dog", "a <b>fox</b>"), start=1):
        page.get_by_label("Message").fill(text)
        page.get_by_label("Message").press("Enter")
        page.get_by_role("button", name="New conversation").wait_for()
        for task, history in messages.items():
            history.append({"role": "user", "content": text})
            body = {"model": task, "messages": history, "max_tokens": 12, "temperature": 0}
            answer = talk.ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            history.append({"role": "assistant", "content": answer})
            own = page.get_by_role("region", name=f"Answer {turn} of {task}")
            assert own.locator("p").first.text_content() == answer
            assert "tokens/s" in own.inner_text()
    tab.accessible()
    page.get_by_label("Call").select_option("completions")
    page.get_by_label("Text").fill("the dog")
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("button", name="Run").click()
    expected = talk.ask("POST", "/v1/completions", json={"model": "a", "prompt": "the dog", "max_tokens": 8}).json()
    own = page.get_by_role("region", name="Answer of a").locator("p").first
    own.wait_for()
    assert own.text_content() == expected["choices"][0]["text"]
    tab.accessible()


def test_a_stream_is_stopped(talk: Audited, opens: Opens) -> None:
    tab = opens(talk)
    tab.page.route(re.compile("/v1/chat"), lambda _: None)  # no answer ever comes
    page = signed_in(tab)
    go(page, "Try")
    page.get_by_label("Message").fill("the dog")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="New conversation").wait_for()
    page.get_by_role("region", name="Answer 1 of base").get_by_text("stopped").wait_for()


@pytest.mark.parametrize("role", ["deploy", "admin"])
def test_live_figures(talk: Audited, opens: Opens, role: str) -> None:
    tab = opens(talk)
    tab.refusals = {403} if role == "deploy" else set()
    page = signed_in(tab, "acme", role)
    go(page, "Live")
    page.get_by_role("img", name=re.compile("^Rows answered: ")).wait_for()
    body = {"model": "a", "prompt": "the dog", "max_tokens": 8}
    assert talk.ask("POST", "/v1/completions", json=body).status_code == 200
    page.get_by_role("img", name=re.compile("^Rows answered: [0-9]")).wait_for()
    tiers = page.get_by_role("table", name="Adapters by tier").get_by_role("rowheader")
    tiers.filter(has_text="device").wait_for()
    if role == "admin":
        for chart in ("Queued rows", "Tokens", "Sequences", "Time of a request, mean", "Rows of a run, mean"):
            page.get_by_role("img", name=re.compile(f"^{chart}: ")).wait_for()
        page.get_by_role("table", name="Generated tokens by tenant").get_by_role("rowheader", name="acme").wait_for()
        page.get_by_role("table", name="Tenants").get_by_role("cell", name="operator").wait_for()
    tab.accessible()


def hostile_tasks(count: int) -> list[dict[str, Any]]:
    own = {"tenant": HOSTILE, "ready": True, "pin": None, "aliases": {"current": "1", HOSTILE: "1"}}
    versions = [{"version": "1", "digest": HOSTILE, "tier": HOSTILE}]
    names = [HOSTILE, LONG, *(f"task-{at:05}" for at in range(count - 2))]
    return [{"name": name, "versions": versions, **own} for name in names]


def test_ten_thousand_tasks_and_hostile_names_are_text(conv: Audited, opens: Opens) -> None:
    tasks = hostile_tasks(10_000)

    def answer(route: Route) -> None:
        query = dict(part.split("=") for part in route.request.url.partition("?")[2].split("&"))
        begin = 1 + next((at for at, own in enumerate(tasks) if own["name"] == query.get("after")), -1)
        route.fulfill(json=tasks[begin : begin + int(query["limit"])])

    tab = opens(conv)
    page = tab.page
    page.route(re.compile("/v2/registry/tasks[?]"), answer)
    page.route(re.compile("/v2/registry/tasks/[^?]*$"), lambda route: route.fulfill(json=tasks[0]))
    page.route(
        re.compile("/history"), lambda route: route.fulfill(json=[{"version": HOSTILE, "time": 0, "key": HOSTILE}])
    )
    signed_in(tab)
    said(page, "10,000 tasks")
    table = page.get_by_role("table", name="Tasks")
    assert table.get_attribute("aria-rowcount") == "10001"
    assert table.get_by_role("row").count() < 60
    table.get_by_role("link", name=HOSTILE, exact=True).wait_for()
    tab.accessible()
    page.locator(".rows").focus()
    page.keyboard.press("End")
    table.get_by_role("link", name="task-09997").wait_for()
    page.get_by_label("Find").fill("task-04321")
    said(page, "1 of 10,000 tasks")
    page.get_by_label("Find").fill("<IMG")
    table.get_by_role("link", name=HOSTILE, exact=True).click()
    page.get_by_role("heading", name=HOSTILE, exact=True).wait_for()
    page.get_by_role("heading", name=f"History of {HOSTILE}").wait_for()
    assert page.locator("img, #app script").count() == 0
    assert page.title() == "Tasks - tpeft_deploy console"


def test_hostile_answers_are_text(talk: Audited, opens: Opens) -> None:
    tab = opens(talk)
    page = tab.page
    known = talk.ask("GET", "/v2").json() | {"text": ["chat", "classify", "embeddings"]}
    page.route(re.compile("/v2$"), lambda route: route.fulfill(json=known))
    data = [{"label": HOSTILE, "probs": [0.25, 0.75], "labels": [LONG, HOSTILE]}]
    page.route(re.compile("/v1/classify"), lambda route: route.fulfill(json={"data": data}))
    page.route(re.compile("/v1/embeddings"), lambda route: route.fulfill(json={"data": [{"embedding": [0.5, -1.0]}]}))
    event = json.dumps({"choices": [{"delta": {"content": HOSTILE}}]})
    page.route(re.compile("/v1/chat"), lambda route: route.fulfill(body=f"data: {event}\n\ndata: [DONE]\n\n"))
    signed_in(tab)
    go(page, "Try")
    page.get_by_label("Message").fill(HOSTILE)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("region", name="Answer 1 of base").get_by_text(HOSTILE, exact=True).wait_for()
    page.get_by_label("Call").select_option("classify")
    page.get_by_label("Text").fill("x")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("rowheader", name=HOSTILE, exact=True).wait_for()
    tab.accessible()
    page.get_by_label("Call").select_option("embeddings")
    page.get_by_label("Text").fill("x")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("2 dimensions").wait_for()
    assert page.locator("img, #app script").count() == 0
    assert page.title() == "Try - tpeft_deploy console"

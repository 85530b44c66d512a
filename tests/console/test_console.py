"""Every action of the console in a browser, against a server with three tenants (`make console-test`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.helpers.console import confirm, go, registered, said, signed_in, task_of, weights
from tpeft_deploy import Adapter

pytestmark = pytest.mark.console

if TYPE_CHECKING:
    from tests.console.conftest import Opens
    from tests.helpers.server.audited import Audited


def test_a_key_stays_in_the_tab_and_is_forgotten_by_a_reload(conv: Audited, opens: Opens) -> None:
    tab = opens(conv)
    tab.refusals = {401}
    page = tab.page
    tab.accessible()
    page.get_by_label("Key").fill("tpk_wrong")
    page.keyboard.press("Enter")
    expected = conv.client.get("/v2", headers={"Authorization": "Bearer tpk_wrong"}).json()["error"]
    page.get_by_role("alert").get_by_text(expected, exact=True).wait_for()
    signed_in(tab)
    key = conv.keys["acme", "deploy"]
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert key not in kept
    assert "tpk_" not in page.content()
    assert not page.context.cookies()
    page.reload()
    page.get_by_label("Key").wait_for()
    assert page.get_by_label("Key").input_value() == ""
    signed_in(tab).get_by_role("button", name="Sign out").click()
    page.get_by_label("Key").wait_for()


def test_each_tenant_and_role_sees_what_is_its_own(conv: Audited, opens: Opens) -> None:
    for tenant, role, seen, pages in [
        ("acme", "infer", {"mood"}, ["Tasks", "Try", "Live"]),
        ("rival", "deploy", {"secret"}, ["Tasks", "Upload", "Try", "Live"]),
        ("operator", "admin", set(), ["Tasks", "Upload", "Try", "Live", "Audit"]),
    ]:
        page = signed_in(opens(conv), tenant, role)
        assert page.get_by_role("navigation").get_by_role("link").all_inner_texts() == pages
        page.get_by_role("link", name="base", exact=True).wait_for()
        names = set(page.get_by_role("table", name="Tasks").get_by_role("link").all_inner_texts())
        assert names & {"mood", "secret"} == seen
        if seen:
            page.get_by_role("link", name=seen.pop(), exact=True).click()
            page.get_by_role("heading", name="Versions").wait_for()
            assert (page.get_by_role("button", name="Delete version 1").count() == 1) == (role == "deploy")


def test_versions_aliases_and_rollback(conv: Audited, opens: Opens, theme: str, adapters: list[Adapter]) -> None:
    name = f"steps-{theme}"  # numbers of versions go on where a task of that name was deleted
    registered(conv, name, adapters[:2])
    tab = opens(conv)
    page = signed_in(tab)
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("heading", name="History of current").wait_for()
    tab.accessible()
    page.get_by_role("button", name="Roll back current").click()
    page.get_by_role("dialog").wait_for()
    tab.accessible()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    assert task_of(conv, name)["aliases"] == {"current": "2"}
    page.get_by_role("button", name="Roll back current").click()
    confirm(page, "Roll back")
    said(page, "Roll current back from version 2: done.")
    assert task_of(conv, name)["aliases"] == {"current": "1"}
    page.get_by_label("Alias to point").fill("canary")
    page.get_by_role("button", name="Point canary at version 2").click()
    confirm(page, "Point")
    page.get_by_role("heading", name="History of canary").wait_for()
    assert task_of(conv, name)["aliases"] == {"current": "1", "canary": "2"}
    page.get_by_role("button", name="Point canary at version 1").click()
    confirm(page, "Point")
    page.get_by_role("button", name="Delete version 2").click()
    confirm(page, "Delete")
    page.get_by_role("button", name="Delete version 2").wait_for(state="detached")
    assert [own["version"] for own in task_of(conv, name)["versions"]] == ["1"]
    page.get_by_role("button", name="Delete", exact=True).click()
    confirm(page, "Delete")
    page.get_by_role("link", name=name, exact=True).wait_for(state="detached")
    assert conv.ask("GET", f"/v2/registry/tasks/{name}").status_code == 404


def test_pins_and_loading(conv: Audited, opens: Opens, theme: str, adapters: list[Adapter]) -> None:
    name = f"kept-{theme}"
    registered(conv, name, adapters[:1])
    page = signed_in(opens(conv))
    page.get_by_role("link", name=name, exact=True).click()
    for action, pin in [("Pin", "device"), ("Unpin", None)]:
        page.get_by_role("button", name=action, exact=True).click()
        confirm(page, action)
        said(page, f"{action} {name}: done.")
        assert task_of(conv, name)["pin"] == pin
    for action, ready in [("Unload", False), ("Load", True)]:
        page.get_by_role("button", name=action, exact=True).click()
        confirm(page, action)
        said(page, f"{action} {name}: done.")
        assert task_of(conv, name)["ready"] is ready
    assert conv.ask("DELETE", f"/v2/registry/tasks/{name}").status_code == 200


def test_a_refused_change_is_shown_in_full(conv: Audited, opens: Opens, theme: str, adapters: list[Adapter]) -> None:
    name = f"stale-{theme}"
    registered(conv, name, adapters[:2])
    tab = opens(conv)
    tab.refusals = {409}
    page = signed_in(tab)
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("button", name="Roll back current").click()
    registered(conv, name, adapters[2:])  # meanwhile
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    refused = conv.ask("POST", f"/v2/registry/tasks/{name}/aliases/current/rollback", json={"expected": "2"})
    assert refused.status_code == 409
    page.get_by_role("dialog").get_by_text(refused.json()["error"], exact=True).wait_for()
    tab.accessible()
    assert conv.ask("DELETE", f"/v2/registry/tasks/{name}").status_code == 200


def test_an_admin_reaches_every_tenant_and_the_audit_trail(
    conv: Audited, opens: Opens, theme: str, adapters: list[Adapter]
) -> None:
    name = f"gift-{theme}"
    registered(conv, name, adapters[2:])
    tab = opens(conv)
    page = signed_in(tab, "operator", "admin")
    page.get_by_label("Tenant").select_option("rival")
    page.get_by_role("link", name="secret", exact=True).wait_for()
    page.get_by_label("Tenant").select_option("acme")
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("button", name="Publish").click()
    confirm(page, "Publish")
    page.get_by_label("Tenant").select_option("shared")
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("button", name="Delete", exact=True).click()
    confirm(page, "Delete")
    page.get_by_role("link", name=name, exact=True).wait_for(state="detached")
    go(page, "Audit")
    page.get_by_label("Find").fill(name)
    rows = page.get_by_role("table", name="Audit").get_by_role("row")
    rows.nth(1).wait_for()
    actions = [row.get_by_role("cell").nth(2).inner_text() for row in rows.all()[1:]]
    assert {"register", "publish"} <= set(actions)
    tab.accessible()


def test_an_upload_shows_its_checks(
    conv: Audited, opens: Opens, theme: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    name = f"fresh-{theme}"
    tab = opens(conv)
    page = signed_in(tab)
    go(page, "Upload")
    page.get_by_label("Files").set_input_files(weights(tmp_path, adapters[2], f"{name}.safetensors"))
    assert page.get_by_label("Task").input_value() == name
    tab.accessible()
    page.get_by_role("button", name="Upload").click()
    said(page, f"Version 1 of {name} is served")
    marks = page.get_by_role("list", name="Checks").get_by_role("listitem").all_inner_texts()
    assert len(marks) == 3
    assert all(mark.startswith("done") for mark in marks)
    assert task_of(conv, name)["aliases"] == {"current": "1"}
    tab.accessible()
    page.get_by_role("link", name="try it").click()
    page.get_by_role("heading", name="Try").wait_for()
    assert page.get_by_label("Task").input_value() == name
    assert conv.ask("DELETE", f"/v2/registry/tasks/{name}").status_code == 200


def test_files_are_dropped(conv: Audited, opens: Opens, theme: str, adapters: list[Adapter]) -> None:
    name = f"dropped-{theme}"
    page = signed_in(opens(conv))
    go(page, "Upload")
    dropped = page.evaluate_handle(
        "bytes => { const own = new DataTransfer();"
        " own.items.add(new File([new Uint8Array(bytes)], 'dropped.safetensors')); return own; }",
        list(adapters[2].to_bytes()),
    )
    page.get_by_text("Drop the files").dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_label("Task").fill(name)
    page.get_by_role("button", name="Upload").click()
    said(page, f"Version 1 of {name} is served")
    assert conv.ask("DELETE", f"/v2/registry/tasks/{name}").status_code == 200


def test_a_refused_upload_is_shown_in_full(conv: Audited, opens: Opens, tmp_path: Path) -> None:
    from safetensors.numpy import save

    tab = opens(conv)
    tab.refusals = {400}
    page = signed_in(tab)
    go(page, "Upload")
    wrong = tmp_path / f"{'x' * 40}<b>.safetensors"
    wrong.write_bytes(save({"nothing.of.the.base": np.ones((2, 2), np.float32)}))
    page.get_by_label("Files").set_input_files(wrong)
    page.get_by_label("Task").fill("wrong")
    page.get_by_role("button", name="Upload").click()
    refused = conv.ask("POST", "/v2/registry/tasks/wrong/versions", files={"weights": wrong.read_bytes()})
    page.get_by_role("alert").get_by_text(refused.json()["error"], exact=True).wait_for()
    marks = page.get_by_role("list", name="Checks").get_by_role("listitem").all_inner_texts()
    assert [mark.split()[0] for mark in marks] == ["done", "done", "failed"]
    tab.accessible()
    page.get_by_role("button", name="Remove").click()
    other = tmp_path / "pickle.bin"
    other.write_bytes(b"\x80\x04 no safetensors")
    page.get_by_label("Files").set_input_files(other)
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("alert").get_by_text("pickle.bin is no safetensors file").wait_for()


def test_the_theme_is_chosen(conv: Audited, opens: Opens, theme: str) -> None:
    from playwright.sync_api import expect

    page = opens(conv).page
    page.get_by_label("Theme").wait_for()
    backgrounds = {"light": "rgb(251, 251, 250)", "dark": "rgb(22, 24, 27)"}
    expect(page.locator("body")).to_have_css("background-color", backgrounds[theme])
    for chosen, background in backgrounds.items():
        page.get_by_label("Theme").select_option(chosen)
        expect(page.locator("body")).to_have_css("background-color", background)


def test_pages_are_reached_by_keyboard_alone(conv: Audited, opens: Opens) -> None:
    page = opens(conv).page
    page.get_by_label("Theme").focus()
    page.keyboard.press("Tab")
    page.keyboard.type(conv.keys["acme", "deploy"])
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Tasks", exact=True).wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "mood":
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="mood").wait_for()


def test_a_server_without_keys_asks_for_none(
    conv: Audited, opens: Opens, conv_bundle: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.helpers.server.audited import audited

    with audited(conv_bundle, tmp_path_factory.mktemp("open"), no_auth="true", grpc_port="") as server:
        page = opens(server).page
        page.get_by_role("heading", name="Tasks", exact=True).wait_for()
        page.get_by_role("link", name="Audit").wait_for()

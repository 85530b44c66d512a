"""Steps of a user in the console, for its tests; imports no Playwright, which only their environment has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpeft_deploy import Adapter

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.helpers.browser import Tab
    from tests.helpers.server.audited import Audited


def signed_in(tab: Tab, tenant: str = "acme", role: str = "deploy") -> Page:
    from tests.helpers.browser import sign_in

    return sign_in(tab, tenant, role)


def go(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="Pages").get_by_role("link", name=name).click()
    page.get_by_role("heading", level=1).wait_for()


def confirm(page: Page, action: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()
    page.get_by_role("dialog").wait_for(state="detached")


def said(page: Page, text: str) -> None:
    page.get_by_role("status").filter(has_text=text).wait_for()


def task_of(server: Audited, name: str, tenant: str = "acme") -> dict[str, Any]:
    found: dict[str, Any] = server.ask("GET", f"/v2/registry/tasks/{name}", tenant).json()
    return found


def registered(server: Audited, name: str, adapters: list[Adapter]) -> None:
    for adapter in adapters:
        assert server.register(adapter, name).status_code == 200


def weights(place: Path, adapter: Adapter, name: str) -> Path:
    file = place / name
    file.write_bytes(adapter.to_bytes())
    return file

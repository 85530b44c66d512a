"""The console in Chromium, as a user sees it; each tab is checked for what a browser would complain of."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tests.helpers.server.asking import Asking

__all__ = ["Tab", "chromium", "open_tab", "sign_in"]

_REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")
_AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


class Tab:
    """A tab, and an account of it.

    Args:
        page: the page.
        server: server of the console.

    Attributes:
        refusals: statuses of the refusals that the test provokes.
    """

    def __init__(self, page: Page, server: Asking) -> None:
        self.page = page
        self.server = server
        self.refusals: set[int] = set()
        self._problems: list[str] = []
        self._requests: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self._problems.append(str(error)))
        page.on("request", self._asked)

    def check(self) -> None:
        """Check that nothing went wrong, and that nothing but the server was asked."""
        assert not self._problems, self._problems
        foreign = [url for url in self._requests if not url.startswith((f"{self.server.url}/", "blob:", "data:"))]
        assert not foreign, foreign
        assert not [url for url in self._requests if "tpk_" in url]

    def accessible(self) -> None:
        """Check the page with axe."""
        found = Axe().run(self.page, options=_AXE)
        assert not found.violations_count, found.generate_report()

    def _said(self, message: ConsoleMessage) -> None:
        refused = _REFUSED.match(message.text)
        if message.type in {"error", "warning"} and not (refused and int(refused[1]) in self.refusals):
            self._problems.append(message.text)

    def _asked(self, request: Request) -> None:
        self._requests.append(request.url)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of this machine; none is downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set CHROMIUM")
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextmanager
def open_tab(browser: Browser, server: Asking, theme: str) -> Iterator[Tab]:
    """A tab in a separate context, checked at the end."""
    context = browser.new_context(color_scheme="dark" if theme == "dark" else "light", reduced_motion="reduce")
    context.set_default_timeout(60_000)
    tab = Tab(context.new_page(), server)
    tab.page.goto(f"{server.url}/console/")
    tab.page.get_by_role("main").wait_for()  # it is drawn after the page has loaded
    yield tab
    tab.check()
    context.close()


def sign_in(tab: Tab, tenant: str = "acme", role: str = "deploy") -> Page:
    """Type the key of a tenant."""
    tab.page.get_by_label("Key").fill(tab.server.keys[tenant, role])
    tab.page.get_by_role("button", name="Sign in").click()
    tab.page.get_by_role("heading", name="Tasks", exact=True).wait_for()
    return tab.page

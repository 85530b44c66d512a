"""Take the screenshots of README.md: the console with the bundle of `make quickstart`, and the site of `make docs`.

    PYTHONPATH=.console-site:. .venv/bin/python .ci/screenshots.py [quickstart] [site]

Needs Chromium, and Playwright in `.console-site` (`make console-test`). Writes docs/images/*.png, light, 1280 wide,
each of at most 150 kB.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

from tests.helpers.browser import chromium
from tests.helpers.commands import succeed
from tests.helpers.server.processes import server
from tpeft_deploy import Client

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
_MOST = 150_000  # bytes of a picture


def main() -> None:
    """Take all pictures anew."""
    quickstart, site = (Path(given) for given in (*sys.argv[1:], *("quickstart", "site")[len(sys.argv) - 1 :]))
    with chromium() as browser, tempfile.TemporaryDirectory() as state:
        context = browser.new_context(
            viewport={"width": 1280, "height": 760}, color_scheme="light", reduced_motion="reduce"
        )
        page = context.new_page()
        page.goto((site / "index.html").resolve().as_uri())
        _save(page, "site")
        arguments = (quickstart / "bundle", "--port", 0, "--state", state, "--provider", "cpu")
        with server(*arguments) as (_, url):
            key = succeed("keys", "create", "--state", state, "--tenant", "acme", "--role", "admin").strip()
            _tasks(page, url, key, quickstart)
            _side_by_side(page, quickstart)


def _tasks(page: Page, url: str, key: str, quickstart: Path) -> None:
    """The list of tasks, with two that a tenant registered."""
    with Client(url, key, timeout=100) as client:
        for name in ("rotated", "mirrored", "rotated"):
            client.register(f"acme-{name}", quickstart / "adapters" / name)
        client.pin("acme-mirrored")
    page.goto(f"{url}/console/")
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("acme-rotated").first.wait_for()
    _save(page, "console-tasks")


def _side_by_side(page: Page, quickstart: Path) -> None:
    """One digit under two tasks."""
    with np.load(quickstart / "sample.npz") as sample:
        pixels = sample["pixels"][:1].astype(np.float64).round(3)
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Try").click()
    page.get_by_label("Task", exact=True).fill("rotated")
    page.get_by_label("Side by side").check()
    page.get_by_label("Second task").fill("mirrored")
    page.get_by_label("JSON of pixels").fill(json.dumps(pixels.tolist()))
    page.get_by_role("button", name="Run").click()
    page.get_by_text("Largest difference from the other").first.wait_for()
    _save(page, "console-side-by-side")


def _save(page: Page, name: str) -> None:
    """Write a picture of what the page shows, with a palette of 256 colours."""
    file = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    if file.tell() > _MOST:
        sys.exit(f"{name} has {file.tell():,} bytes, more than {_MOST:,}")
    (IMAGES / f"{name}.png").write_bytes(file.getvalue())
    print(f"{name}: {file.tell():,} bytes")


if __name__ == "__main__":
    main()

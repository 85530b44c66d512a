"""How long the console takes from signing in to a list of tasks, in Chromium, against a live server.

    PYTHONPATH=.console-site:. python -m benchmarks.console_tasks --cache DIRECTORY [--rounds N]

Needs Chromium, and Playwright in `.console-site` (`make console-test`).  The goal is 1 s for 10,000 tasks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser

from benchmarks.runtime import TASKS, cached
from benchmarks.server import register_tasks
from tests.helpers.browser import chromium
from tests.helpers.commands import succeed
from tests.helpers.server.processes import server

COUNTS = (20, 1_000, 10_000)


def seconds(browser: Browser, url: str, key: str, count: int) -> float:
    """From the click on "Sign in" until the page says how many tasks there are."""
    context = browser.new_context(viewport={"width": 1280, "height": 760})
    page = context.new_page()
    page.goto(f"{url}/console/")
    page.get_by_label("Key").fill(key)
    began = time.perf_counter()
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("status").filter(has_text=f"{count:,} tasks").wait_for()
    took = time.perf_counter() - began
    context.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="Where exported bundles are kept.")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bundle = cached(options.cache, "encoder", TASKS)
    with chromium() as browser:
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as state:
                own = len(TASKS) + 2  # the tasks of the bundle, its base and itself
                register_tasks(bundle, Path(state), count - own)
                with server(bundle.path, "--port", 0, "--state", state, "--provider", "cpu") as (_, url):
                    key = succeed("keys", "create", "--state", state, "--tenant", "quiet", "--role", "admin").strip()
                    times = [seconds(browser, url, key, count) for _ in range(options.rounds + 1)][1:]
            print(f"{count:,} tasks: {statistics.median(times):.2f} s, at most {max(times):.2f} s")


if __name__ == "__main__":
    main()

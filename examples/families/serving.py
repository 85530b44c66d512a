"""`tpeft-deploy serve` in a process, and how long its answers take."""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

COMMAND = [sys.executable, "-c", "from tpeft_deploy.cli import main; main()"]


@contextmanager
def serving(bundle: Path, place: Path, threads: int = 1) -> Iterator[httpx.Client]:
    """Serve a bundle on a free port until the block ends, without keys.

    Args:
        bundle: directory of the bundle.
        place: new directory for the state and the log.
        threads: intra-op threads.
    """
    place.mkdir(parents=True)
    state, log, quotas = place / "state", place / "log", place / "quotas.toml"
    quotas.write_text("requests_per_s = 1e9\nrows_per_s = 1e9\n")
    command = [*COMMAND, "serve", str(bundle), "--state", str(state), "--port", "0", "--provider", "cpu"]
    command += ["--threads", str(threads), "--config", str(quotas), "--no-access-log", "--no-auth"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        while (found := re.search(r"serving on (http://\S+:\d+)", log.read_text(errors="replace"))) is None:
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        with httpx.Client(base_url=found[1], timeout=120) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def ask(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """Data of the answer to one request, in the order of the texts."""
    answer = client.post(path, json=body)
    answer.raise_for_status()
    data: list[dict[str, Any]] = answer.json()["data"]
    assert [own["index"] for own in data] == list(range(len(data)))
    return data


def measure(
    client: httpx.Client, path: str, bodies: Sequence[dict[str, Any]], seconds: float, at_once: int = 16
) -> dict[str, float]:
    """Milliseconds of a request alone, and requests answered each second with several at once.

    Args:
        client: client of the server.
        path: path of the requests.
        bodies: requests, which take turns.
        seconds: length of each of the two measurements.
        at_once: requests in flight in the second one.
    """
    alone: list[float] = []
    for turn in range(3):
        ask(client, path, **bodies[turn % len(bodies)])
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not alone:
        began = time.perf_counter()
        ask(client, path, **bodies[len(alone) % len(bodies)])
        alone.append(time.perf_counter() - began)
    rate = asyncio.run(_rate(client, path, bodies, seconds, at_once))
    return {"alone_ms": 1e3 * statistics.median(alone), "at_once": at_once, "requests_per_s": rate}


async def _rate(
    client: httpx.Client, path: str, bodies: Sequence[dict[str, Any]], seconds: float, at_once: int
) -> float:
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as own:

        async def stream(number: int) -> int:
            count = 0
            while time.perf_counter() < began + seconds or not count:
                answer = await own.post(path, json=bodies[(number + count) % len(bodies)])
                answer.raise_for_status()
                count += 1
            return count

        answered = sum(await asyncio.gather(*(stream(number) for number in range(at_once))))
    return answered / (time.perf_counter() - began)

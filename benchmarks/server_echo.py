"""What a request costs the server beyond the run of the model, against an ASGI application that only echoes it.

    python -m benchmarks.server_echo [--rounds N] [--seconds S] [--connections N] [--json]

`tpeft-deploy serve` with keys, quotas and metrics, and uvicorn (uvloop, httptools) with an application of one line
answer the same bytes, in turns of S seconds, each server on the first core and wrk (or, --client asyncio, a client
written with asyncio) on the second.  Processor time is that of the server's whole process, from /proc.  What ONNX
Runtime itself takes is subtracted: its run of the banked graph on as many rows as the server's batches had, divided by
them; all else of the runtime counts as the server's.  The ratio is that of a round; medians of them are printed.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

from tpeft_deploy import Bundle, Runtime

PIXELS, HIDDEN, TASKS, TENANTS = 64, 16, 4, 4
TICK = os.sysconf("SC_CLK_TCK")
Asked = tuple[str, dict[str, str], bytes]  # path, headers, body


async def echo(scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
    """The application that costs least."""
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def small(place: Path) -> Bundle:
    """A model that takes next to no time, with adapters."""
    # Here, as what measures requests alone imports this module without torch.
    import torch

    from benchmarks.export import adapter_for
    from tpeft_deploy import export_bundle

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(PIXELS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)).eval()
    adapters = {f"task-{seed}": adapter_for(module, seed) for seed in range(TASKS)}
    batch = {"input": torch.randn(2, PIXELS)}  # rows that differ, else nothing tells that they can be mixed
    return export_bundle(
        module, adapters, place, name="small", max_rank=8, example_inputs=batch, dynamic_shapes={"input": {0: "batch"}}
    )


@dataclass(frozen=True)
class Target:
    """A server, and the requests that it is sent."""

    process: subprocess.Popen[bytes]
    port: int
    requests: list[Asked]

    def spent(self) -> float:
        """Seconds of processor time since it began."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


def infer_request() -> tuple[bytes, str]:
    document = {
        "inputs": [
            {"name": "input", "shape": [1, PIXELS], "datatype": "FP32", "parameters": {"binary_data_size": 4 * PIXELS}}
        ],
        "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(document).encode()
    row = np.random.default_rng(0).standard_normal(PIXELS).astype(np.float32)
    return text + row.tobytes(), str(len(text))


@contextmanager
def started(command: list[str], pattern: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process on the first core, once it says on which port it serves."""
    path = Path(tempfile.mkdtemp()) / "stderr"
    with path.open("wb") as stderr:
        process = subprocess.Popen(["taskset", "-c", "0", sys.executable, *command], stderr=stderr)
    try:
        until = time.monotonic() + 60
        while (found := re.search(pattern, path.read_text(errors="replace"))) is None:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command} did not start:\n{path.read_text(errors='replace')}")
            time.sleep(0.05)
        yield process, int(found[1])
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(path.parent)


@contextmanager
def ours(bundle: Bundle, state: Path, *, log: bool) -> Iterator[Target]:
    body, length = infer_request()
    keys = [_key(state, f"tenant-{number}", "infer") for number in range(TENANTS)]
    requests = [
        (
            f"/v2/models/task-{number % TASKS}/infer",
            {
                "Authorization": f"Bearer {keys[number % TENANTS]}",
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": length,
            },
            body,
        )
        for number in range(TASKS * TENANTS)
    ]
    quotas = state.parent / "quotas.toml"
    quotas.write_text("requests_per_s = 1e9\nrows_per_s = 1e9\n")
    more = ["--port", "0", "--threads", "1", "--config", str(quotas)] + ([] if log else ["--no-access-log"])
    command = ["-c", "from tpeft_deploy.cli import main; main()", "serve", str(bundle.path), "--state", str(state)]
    with started([*command, *more], r"serving on http://127.0.0.1:(\d+)") as (process, port):
        yield Target(process, port, requests)


@contextmanager
def echoing(requests: list[Asked]) -> Iterator[Target]:
    command = ["-m", "uvicorn", "benchmarks.server_echo:echo", "--port", "0", "--no-access-log", "--loop", "uvloop"]
    command += ["--http", "httptools", "--lifespan", "off"]
    with started(command, r"running on http://127.0.0.1:(\d+)") as (process, port):
        yield Target(process, port, requests)


def _key(state: Path, tenant: str, role: str) -> str:
    code = "from tpeft_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "keys", "create", "--state", str(state)]
    made = subprocess.run([*command, "--tenant", tenant, "--role", role], capture_output=True, text=True, check=True)
    return made.stdout.strip()


def with_wrk(target: Target, seconds: float, connections: int, place: Path) -> int:
    """Answers with status 200 that wrk got."""
    script = place / "requests.lua"
    lines = ["local requests = {}"]
    for path, headers, body in target.requests:
        own = '["Host"] = "localhost", ' + ", ".join(f'["{name}"] = "{value}"' for name, value in headers.items())
        escaped = "".join(f"\\{byte:03d}" for byte in body)
        lines.append(f'requests[#requests + 1] = wrk.format("POST", "{path}", {{{own}}}, "{escaped}")')
    lines += ["local at = 0", "function request()", "  at = at % #requests + 1", "  return requests[at]", "end"]
    script.write_text("\n".join(lines))
    url = f"http://127.0.0.1:{target.port}"
    command = ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"not all were answered:\n{text}")
    found = re.search(r"(\d+) requests in", text)
    assert found is not None
    return int(found[1])


def with_asyncio(target: Target, seconds: float, connections: int, place: Path) -> int:
    """The same with a client of a few lines, in this process."""
    del place
    texts = []
    for path, headers, body in target.requests:
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        texts.append(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
    until = time.perf_counter() + seconds

    async def client(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        count = 0
        while time.perf_counter() < until:
            writer.write(texts[(number + count) % len(texts)])
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(head.decode())
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            count += 1
        writer.close()
        return count

    async def all_of_them() -> int:
        return sum(await asyncio.gather(*(client(number) for number in range(connections))))

    return asyncio.run(all_of_them())


CLIENTS = {"wrk": with_wrk, "asyncio": with_asyncio}


def mean_batch(target: Target, admin: str) -> tuple[float, float]:
    """Sum and count of the rows of the run of each request, so far."""
    request = Request(f"http://127.0.0.1:{target.port}/metrics", headers={"Authorization": f"Bearer {admin}"})
    text = urlopen(request).read().decode()
    values = [re.search(rf"tpeft_batch_rows_{what} (\S+)", text) for what in ("sum", "count")]
    if None in values:
        raise SystemExit("no metrics of batches")
    total, count = (float(found[1]) for found in values if found is not None)
    return total, count


def run_seconds(bundle: Bundle, rows: int) -> float:
    """Processor time of ONNX Runtime's own run of the banked graph, bound as the server binds it, on mixed rows."""
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        tasks = [f"task-{row % TASKS}" for row in range(rows)]
        inputs = {"input": np.zeros((rows, PIXELS), np.float32)}
        runtime.run(inputs, tasks=tasks)
        bank = runtime._residency._bank
        binding = bank.bindings.pop()
        session: Any = runtime._part(None).session._session
        found = []
        for _ in range(7):
            began = time.process_time()
            for _ in range(300):
                session.run_with_iobinding(binding)
            found.append((time.process_time() - began) / 300)
    return statistics.median(found)


def measure(options: argparse.Namespace, place: Path) -> dict[str, float]:
    bundle = small(place / "bundle")
    state = place / "state"
    admin = _key(state, "operator", "admin")
    load = CLIENTS[options.client]
    costs: dict[str, list[float]] = {"echo": [], "server": []}
    batches: list[float] = []
    with ExitStack() as stack:
        own = stack.enter_context(ours(bundle, state, log=options.access_log))
        targets = {"echo": stack.enter_context(echoing(own.requests)), "server": own}
        for turn in range(options.rounds + 1):
            before = mean_batch(own, admin)[:2] if turn else (0.0, 0.0)
            for name, target in targets.items():
                began = target.spent()
                answered = load(target, options.seconds, options.connections, place)
                if turn:
                    costs[name].append(1e6 * (target.spent() - began) / answered)
            if turn:
                total, count = (b - a for a, b in zip(before, mean_batch(own, admin), strict=True))
                batches.append(total / count)
    rows = max(1, round(statistics.median(batches)))
    run = 1e6 * run_seconds(bundle, rows) / rows
    ratios = [(one - run) / echoed for one, echoed in zip(costs["server"], costs["echo"], strict=True)]
    return {
        "echo, us of processor time": statistics.median(costs["echo"]),
        "server, us": statistics.median(costs["server"]),
        "rows of a run": statistics.median(batches),
        "ONNX Runtime's run, us a row": run,
        "server without the run / echo": statistics.median(ratios),
        "server without the run / echo, quartiles apart": statistics.quantiles(ratios)[2]
        - statistics.quantiles(ratios)[0],
    }


def show(figures: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    for what, value in figures.items():
        print(f"{what:50} {value:10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each turn.")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--client", choices=sorted(CLIENTS), default="wrk")
    parser.add_argument("--access-log", action="store_true", help="With a line for each request.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = measure(options, Path(place))
    show(figures, as_json=options.json)


if __name__ == "__main__":
    main()

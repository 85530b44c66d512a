"""A server, a tenant that attacks it, and what a neighbour sees meanwhile.

    python -m tests.helpers.hostile_server.arena [ATTACK ...] [--seconds S] [--json]

prints for each attack, measured in turns with quiet times of the same server: the neighbour's p50 and p99 alone and
beside it, how many of its requests were not answered with 200, the slowest health check, the most memory of the server
and its children, and what the attacker was answered.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.helpers.hostile_server.attacks import ATTACKS, binary
from tpeft_deploy.runtime.server.registry import open_keys

ROOT = Path(__file__).parents[3]
PACE = 0.02  # seconds between two requests of the neighbour
_SERVER = """
import resource, sys
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from tpeft_deploy.cli import main
main()
"""


@dataclass
class Seen:
    """What was seen in one stretch of time.

    Attributes:
        seconds: of each request of the neighbour.
        statuses: of its requests.
        health: seconds of each health check; infinite where it failed.
        memory: most bytes that the server and its children had resident.
        answers: what the attacker was answered.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)
    memory: int = 0
    answers: dict[str, int] = field(default_factory=dict)

    def quantile(self, q: float) -> float:
        """Seconds of the neighbour's requests."""
        return float(np.quantile(self.seconds, q)) if self.seconds else math.inf

    @property
    def refused(self) -> int:
        """Requests of the neighbour that were not answered with 200."""
        return sum(count for status, count in self.statuses.items() if status != "200")


class Arena:
    """A server with two tenants.

    Attributes:
        process: the server.
        port: of HTTP.
        grpc_port: of gRPC.
        keys: tenant -> key.
    """

    def __init__(self, process: subprocess.Popen[str], port: int, grpc_port: int, keys: dict[str, str], adapter: Path):
        self.process = process
        self.port = port
        self.grpc_port = grpc_port
        self.keys = keys
        self._adapter = adapter
        self._stderr = threading.Thread(target=self._read, daemon=True)
        self.tail: list[str] = []
        self._stderr.start()

    def alone(self, seconds: float) -> Seen:
        """The neighbour without attacker."""
        return self._watch(seconds, None)

    def attacked(self, attacks: Sequence[str], seconds: float) -> Seen:
        """The neighbour beside one or several attacks of one tenant, from a process that gives way to others."""
        line = [sys.executable, "-m", "tests.helpers.hostile_server.attacks", ",".join(attacks)]
        line += [str(self.port), str(self.grpc_port), self.keys["attacker"]]
        own = os.environ | {"ADAPTER": str(self._adapter), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            ["nice", "-n", "10", *line], cwd=ROOT, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as attacker:
            assert attacker.stdin is not None
            assert attacker.stdout is not None
            try:
                time.sleep(min(3.0, seconds))  # until it is at full strength
                seen = self._watch(seconds, attacker)
                attacker.stdin.close()
                seen.answers = json.loads(attacker.stdout.readline() or "{}")
            finally:
                attacker.kill()
        return seen

    def ask(self, tenant: str, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        """The status of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self.keys[tenant]}", **headers})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def memory(self) -> int:
        """Bytes that the server and its children have resident."""
        total = 0
        for pid in [self.process.pid, *_children(self.process.pid)]:
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmRSS"))
        return total

    def end(self, seconds: float) -> float:
        """Seconds that the server takes to end after SIGTERM.

        Raises:
            TimeoutExpired: more than `seconds`.
        """
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=seconds)
        return time.monotonic() - began

    def _watch(self, seconds: float, attacker: subprocess.Popen[str] | None) -> Seen:
        seen = Seen()
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._neighbour, args=(seen, until)),
            threading.Thread(target=self._health, args=(seen, until)),
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            seen.memory = max(seen.memory, self.memory())
            time.sleep(0.1)
        return seen

    def _neighbour(self, seen: Seen, until: float) -> None:
        body, headers = binary(1)
        headers["Authorization"] = f"Bearer {self.keys['neighbour']}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while (began := time.monotonic()) < until:
            try:
                connection.request("POST", "/v2/models/calm/infer", body, headers)
                answer = connection.getresponse()
                answer.read()
                seen.statuses[str(answer.status)] += 1
            except (OSError, http.client.HTTPException) as error:
                seen.statuses[type(error).__name__] += 1
                connection.close()
            seen.seconds.append(time.monotonic() - began)
            time.sleep(max(0.0, began + PACE - time.monotonic()))
        connection.close()

    def _health(self, seen: Seen, until: float) -> None:
        while (began := time.monotonic()) < until:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request("GET", "/v2/health/live")
                fine = connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                fine = False
            finally:
                connection.close()
            seen.health.append(time.monotonic() - began if fine else math.inf)
            time.sleep(max(0.0, began + 0.2 - time.monotonic()))

    def _read(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(ValueError):  # closed at the end
            for line in self.process.stderr:
                self.tail = [*self.tail[-200:], line[:2000]]


@contextlib.contextmanager
def arena(bundle: Path, adapter: bytes, place: Path, *flags: object, memory: int = 0) -> Iterator[Arena]:
    """A server on a bundle, with an adapter for the tenants `attacker` (weight 0.01) and `neighbour`.

    Args:
        bundle: directory of the bundle.
        adapter: bytes that both tenants register, as tasks `mood` and `calm`.
        place: an empty directory.
        flags: settings for `serve`; environment variables where they contain "=".
        memory: bytes of address space that the server may have; 0 is no limit.
    """
    state = place / "state"
    own, database = open_keys(state)
    keys = {tenant: own.create(tenant, role, by="arena")[1] for tenant, role in _ROLES}
    database.close()
    file = place / "adapter.safetensors"
    file.write_bytes(adapter)
    given = dict(str(flag).split("=", 1) for flag in flags if "=" in str(flag))
    line = [sys.executable, "-c", _SERVER, str(memory), "serve", str(bundle), "--state", str(state), "--port", "0"]
    line += ["--grpc-port", "0", "--provider", "cpu", "--threads", "1", "--no-access-log"]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"} | given
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        port, grpc_port = _ports(process)
        found = Arena(process, port, grpc_port, keys, file)
        for tenant, task in (("attacker", "mood"), ("neighbour", "calm")):
            assert found.ask(tenant, "POST", f"/v2/registry/tasks/{task}/versions", adapter) == 200
        quota = json.dumps({"weight": 0.01}).encode()
        assert found.ask("operator", "PUT", "/v2/admin/tenants/attacker", quota) == 200
        yield found
    finally:
        process.kill()
        process.communicate()


_ROLES = (("attacker", "deploy"), ("neighbour", "deploy"), ("operator", "admin"))


def _ports(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stderr is not None
    seen: list[int] = []
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving "):
            seen.append(int(line.rstrip().rpartition(":")[2]))
            if len(seen) == 2:
                return seen[0], seen[1]
    raise AssertionError("".join(lines))


def _children(pid: int) -> list[int]:
    try:
        own = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        for task in Path(f"/proc/{pid}/task").iterdir():
            own += [int(one) for one in (task / "children").read_text().split() if int(one) not in own]
    except OSError:
        return []
    return own + [grand for child in own for grand in _children(child)]


def row(name: str, alone: Seen, beside: Seen) -> dict[str, object]:
    """The figures of an attack."""
    return {
        "attack": name,
        "p50 alone ms": round(1e3 * alone.quantile(0.5), 2),
        "p99 alone ms": round(1e3 * alone.quantile(0.99), 2),
        "p50 ms": round(1e3 * beside.quantile(0.5), 2),
        "p99 ms": round(1e3 * beside.quantile(0.99), 2),
        "p99 ratio": round(beside.quantile(0.99) / alone.quantile(0.99), 2),
        "requests": len(beside.seconds),
        "not 200": beside.refused,
        "slowest health s": round(max(beside.health, default=math.inf), 2),
        "MB": beside.memory >> 20,
        "attacker was answered": beside.answers,
    }


def main() -> None:
    """Print the figures of attacks."""
    from tests.helpers import nets
    from tpeft_deploy import export_bundle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", default=list(ATTACKS))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--together", action="store_true", help="all of them at once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    module, inputs = nets.conv_net()
    adapter = nets.adapter_for(module, {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}, seed=0)
    rows = []
    groups = [list(options.attacks)] if options.together else [[name] for name in options.attacks]
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(module, {"one": adapter}, Path(folder) / "bundle", example_inputs=inputs)
        own = nets.adapter_for(module, {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}, seed=1)
        for number, group in enumerate(groups):
            place = Path(folder) / str(number)
            place.mkdir()
            with arena(Path(folder) / "bundle", own.to_bytes(), place) as found:
                found.alone(1.0)
                before = found.alone(options.seconds)
                beside = found.attacked(group, options.seconds)
                rows.append(row("+".join(group) if len(group) < 4 else "all", before, beside))
                try:
                    rows[-1]["ended s"] = round(found.end(60), 1)
                except subprocess.TimeoutExpired:
                    rows[-1]["ended s"] = "never"
            print(json.dumps(rows[-1]) if options.json else _line(rows[-1]), flush=True)


def _line(figures: dict[str, object]) -> str:
    return "  ".join(f"{name} {value}" for name, value in figures.items())


if __name__ == "__main__":
    main()

"""Independent clients of the protocol, their whole call lists, against `tpeft-deploy serve`: REST and gRPC.

What they get is compared with the torch model that has the task's adapter merged into it, mixed rows included.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import nets
from tests.helpers.server import conformance
from tests.helpers.server.conformance_facts import Facts
from tests.helpers.server.processes import COMMAND, ROOT, command
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter, Bundle, Client
from tpeft_deploy.tucker import Array


@dataclass(frozen=True)
class Whole:
    """A running server with everything that the clients call for."""

    http: str
    grpc: str
    key: str
    facts: Facts


def merged(adapter: Adapter | None) -> dict[str, Array]:
    """All outputs of the torch model with an adapter merged into it."""
    module = nets.conv_net()[0]
    weights = module.state_dict()
    changed: dict[str, torch.Tensor] = {}
    if adapter is not None:
        changed = {n: (weights[n].double() + torch.from_numpy(d.dense())).float() for n, d in adapter.deltas.items()}
        changed |= {name: torch.from_numpy(array) for name, array in adapter.overrides.items()}
    with torch.no_grad():
        outputs = torch.func.functional_call(module, changed, (torch.from_numpy(PIXELS),))
    return {name: np.asarray(array) for name, array in outputs.items()}


def key_of(state: Path, tenant: str) -> str:
    return command("keys", "create", "--state", state, "--tenant", tenant, "--role", "deploy").stdout.strip()


@pytest.fixture(scope="module")
def whole(
    conv_bundle: Bundle,
    conv_adapters: dict[str, Adapter],
    others: list[Adapter],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Whole]:
    place = tmp_path_factory.mktemp("whole")
    keys = {tenant: key_of(place / "state", tenant) for tenant in ("acme", "rival")}
    arguments = [
        "serve",
        conv_bundle.path,
        "--state",
        place / "state",
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--threads",
        "1",
    ]
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found: dict[str, str] = {}
        while len(found) < 2:
            match = re.match(r"serving (gRPC )?on (?:http://)?(\S+)", process.stderr.readline())
            if match:
                found[match[1] or "http"] = match[2]
        drain = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=process.stderr)
        for number, adapter in enumerate(others):
            (place / f"{number}.safetensors").write_bytes(adapter.to_bytes())
        for tenant, name, number in (("acme", "mood", 0), ("acme", "mood", 1), ("rival", "secret", 2)):
            with Client(f"http://{found['http']}", keys[tenant]) as client:
                client.register(name, place / f"{number}.safetensors")
        versions = {
            "base": {"1": merged(None)},
            "partial": {"1": merged(conv_adapters["partial"])},
            "mood": {"1": merged(others[0]), "2": merged(others[1])},
        }
        facts = Facts(
            "conv", {"pixels": PIXELS}, versions, "secret", "mood", rtol=1e-4, atol=1e-5, platform="onnxruntime_onnx"
        )
        yield Whole(found["http"], found["gRPC "], keys["acme"], facts)
    finally:
        process.terminate()
        assert process.wait(timeout=100) == 0
        drain.wait(timeout=100)
        process.stderr.close()


@pytest.mark.parametrize(
    "check",
    [conformance.check_triton_http, conformance.check_triton_http_aio, conformance.check_kserve_rest],
)
def test_clients_over_http(whole: Whole, check: Callable[[str, str, Facts], None]) -> None:
    url = f"http://{whole.http}" if check is conformance.check_kserve_rest else whole.http
    check(url, whole.key, whole.facts)


@pytest.mark.parametrize(
    "check",
    [conformance.check_triton_grpc, conformance.check_triton_grpc_aio, conformance.check_kserve_grpc],
)
def test_clients_over_grpc(whole: Whole, check: Callable[[str, str, Facts], None]) -> None:
    check(whole.grpc, whole.key, whole.facts)

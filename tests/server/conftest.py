from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.server.isolation.pool import Reader
from tpeft_deploy.runtime.server.operations.options import Options, order_of
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.registry import State, open_state
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.messages import UploadPart

if TYPE_CHECKING:
    from tests.helpers.server.audited import Audited  # which imports this
    from tests.helpers.server.postgres import Postgres

PIXELS = np.random.default_rng(0).standard_normal((4, 1, 12, 14)).astype(np.float32)


async def upload(**files: bytes) -> AsyncIterator[UploadPart]:
    """The parts of an upload, in small pieces."""

    async def pieces(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    for name, data in files.items():
        yield name, pieces(data)


@dataclass
class Served:
    """A service on a runtime of its own."""

    service: Service
    runtime: Runtime
    state: State
    bundle: Bundle
    forgotten: list[tuple[str, str]] = field(default_factory=list)

    def who(self, tenant: str = "acme", role: str = "deploy") -> Principal:
        return Principal(tenant, Role(role), f"a key of {tenant}")


def serve(
    bundle: Bundle, place: Path, reader: Reader | None = None, state: State | None = None, **runtime: Any
) -> Served:
    state = open_state(place, default=Quota()) if state is None else state
    order = order_of(state, Limits())
    own = Runtime(
        bundle.path, provider="cpu", threads=1, order=order, sequence_order=order.sequences, limits=Limits(), **runtime
    )
    forgotten: list[tuple[str, str]] = []
    options = Options(reader=reader, forget=lambda tenant, task: forgotten.append((tenant, task)))
    return Served(Service(own, bundle, state, order, options), own, state, bundle, forgotten)


@pytest.fixture
def served(conv_bundle: Bundle, tmp_path: Path) -> Iterator[Served]:
    own = serve(conv_bundle, tmp_path / "state")
    yield own
    own.runtime.close()
    own.state.close()


@pytest.fixture(scope="session")
def others() -> list[Adapter]:
    """Adapters that the bundle does not have."""
    module = nets.conv_net()[0]
    return [
        nets.adapter_for(module, {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}, seed=seed) for seed in range(3)
    ]


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that generates text."""
    from tests.helpers.server.text_bundle import text_bundle

    return text_bundle(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with cert.pem, which signs itself for this machine's own names, and key.pem."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL for the whole run."""
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed: pip install 'psycopg[binary]'")
    from tests.helpers.server.postgres import running

    with running() as own:
        yield own


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Where a state's tables are: beside its files, or in a PostgreSQL, empty."""
    if request.param == "sqlite":
        return None
    own: Postgres = request.getfixturevalue("postgres")
    return own.empty()


@pytest.fixture(scope="session")
def server(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, others: list[Adapter]) -> Iterator[Audited]:
    """One with the default settings and an adapter of each of two tenants; a module may have another of its own."""
    from tests.helpers.server.audited import audited

    with audited(conv_bundle, tmp_path_factory.mktemp("audited")) as found:
        assert found.register(others[0]).status_code == 200
        assert found.register(others[1], "secret", "rival").status_code == 200
        yield found
        found.check_conduct()

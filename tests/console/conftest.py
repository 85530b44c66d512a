from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle

if TYPE_CHECKING:  # which import what only the environment of these tests has
    from playwright.sync_api import Browser

    from tests.helpers.browser import Tab
    from tests.helpers.server.asking import Asking
    from tests.helpers.server.audited import Audited

Opens = Callable[["Asking"], "Tab"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from tests.helpers.browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def adapters() -> list[Adapter]:
    """Adapters that the bundle does not have."""
    module = nets.conv_net()[0]
    return [nets.adapter_for(module, {"up.weight": (2, 2)}, seed=seed) for seed in range(3)]


@pytest.fixture(scope="session")
def conv(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, adapters: list[Adapter]) -> Iterator[Audited]:
    """A server of tensors, with a task of each of two tenants."""
    from tests.helpers.server.audited import audited

    with audited(conv_bundle, tmp_path_factory.mktemp("conv")) as found:
        assert found.register(adapters[0]).status_code == 200
        assert found.register(adapters[1], "secret", "rival").status_code == 200
        yield found
        found.check_conduct()


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """A server that generates text."""
    from tests.helpers.server.audited import audited
    from tests.helpers.server.text_bundle import text_bundle

    place = tmp_path_factory.mktemp("talk")
    with audited(text_bundle(place), place / "server") as found:
        yield found


@pytest.fixture(params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def opens(browser: Browser, theme: str) -> Iterator[Opens]:
    """Opens tabs, each of which is checked at the end."""
    from tests.helpers.browser import open_tab

    with ExitStack() as stack:
        yield lambda server: stack.enter_context(open_tab(browser, server, theme))

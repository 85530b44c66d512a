from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.server.live import Live, running
from tests.helpers.server.text_bundle import text_bundle
from tests.server.conftest import serve
from tpeft_deploy import Bundle


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return text_bundle(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def live(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    own = serve(talking, tmp_path_factory.mktemp("state"))
    with running(own) as live:
        yield live
    own.runtime.close()
    own.state.close()

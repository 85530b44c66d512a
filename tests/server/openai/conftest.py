from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.server.live import Live, running
from tests.server.conftest import serve
from tpeft_deploy import Bundle


@pytest.fixture(scope="module")
def live(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    own = serve(talking, tmp_path_factory.mktemp("state"))
    with running(own) as live:
        yield live
    own.runtime.close()
    own.state.close()

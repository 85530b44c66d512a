from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.server.live import Live, serving_bundle
from tpeft_deploy import Bundle


@pytest.fixture(scope="module")
def live(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_bundle(talking, tmp_path_factory.mktemp("state")) as live:
        yield live

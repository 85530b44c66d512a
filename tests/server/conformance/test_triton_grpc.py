from __future__ import annotations

import pytest

from tests.helpers.server.conformance import check_kserve_grpc, check_triton_grpc, check_triton_grpc_aio
from tests.helpers.server.fake_rpc_core import facts
from tests.helpers.server.rpc_serving import serving


@pytest.mark.parametrize("check", [check_triton_grpc, check_triton_grpc_aio, check_kserve_grpc])
@pytest.mark.parametrize("tenant", ["acme", "globex"])
def test_a_clients_whole_call_list_against_the_calls_of_grpc(check: object, tenant: str) -> None:
    with serving() as server:
        check(server.address, f"{tenant}-deploy", facts(tenant))  # type: ignore[operator]

"""What a model's inputs cannot fill is refused by its declared size, and what they can is taken."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.server.audited import Audited
from tpeft_deploy import Bundle
from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.runtime.server import main
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.server.v2.largest_body import largest_body


@given(rows=st.integers(1, 40), name=st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=128))
def test_every_request_of_so_many_rows_fits(conv_bundle: Bundle, rows: int, name: str) -> None:
    manifest = conv_bundle.manifest
    bound = largest_body(manifest, rows)
    assert bound is not None
    inputs: list[dict[str, Any]] = []
    for port in manifest.inputs:
        shape = [rows if isinstance(size, str) else size for size in port.shape]
        longest = [-np.finfo(np.float64).tiny] * int(np.prod(shape))  # 23 digits and signs
        inputs.append({"name": port.name, "shape": shape, "datatype": "FP32", "data": longest})
    inputs.append({"name": "adapter", "shape": [rows], "datatype": "BYTES", "data": [name] * rows})
    assert len(json.dumps({"inputs": inputs}, indent=0)) <= bound


def test_axes_without_bound_have_none(conv_bundle: Bundle) -> None:
    manifest = conv_bundle.manifest
    free = dataclasses.replace(manifest, inputs=(Port("ids", "int64", (manifest.batch_axis or "B", "length")),))
    assert largest_body(free, 8) is None
    assert largest_body(manifest, None) is None


@pytest.mark.parametrize(
    ("largest", "given", "expected"),
    [(9 << 20, None, 9 << 20), (1 << 20, None, 4 << 20), (None, None, 64 << 20), (9 << 20, 5 << 20, 5 << 20)],
)
def test_messages_over_grpc_are_as_large_as_is_of_use(
    monkeypatch: pytest.MonkeyPatch, largest: int | None, given: Any, expected: int
) -> None:
    monkeypatch.setattr(main, "Servicer", lambda _core, limits, *_: limits)
    monkeypatch.setattr(main, "RpcServer", lambda _servicer, limits, **_: limits)
    settings = Settings(grpc_port=0, max_grpc_bytes=given)
    service: Any = SimpleNamespace(largest_body=largest)
    limits: Any = main.rpc_server(service, settings, lambda _: None, settings.intake, None)
    assert limits.message_bytes == expected


@pytest.mark.parametrize("encoding", [{}, {"Content-Encoding": "gzip"}])
def test_what_no_request_can_fill_is_not_read(server: Audited, encoding: dict[str, str]) -> None:
    found = server.ask("POST", "/v2/models/mood/infer", content=bytes(40 << 20), headers=encoding)
    assert found.status_code == 413

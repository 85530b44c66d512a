"""The choice graph in ONNX Runtime, on logits in memory that a decoder wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.errors import RunError
from tpeft_deploy.exporters.graph import top_logits
from tpeft_deploy.exporters.oracle.compare import open_session
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.generation.sampling import Sampler
from tpeft_deploy.runtime.generation.top_logits.device_logits import DeviceLogits, TopLogits, choices, widened
from tpeft_deploy.tucker import Array

VOCABULARY, SLOTS = 600, 6
DTYPES = [(ir.DataType.FLOAT, np.float32), (ir.DataType.FLOAT16, np.float16), (ir.DataType.BFLOAT16, np.uint16)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.8, "logprobs": 3},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 0.9, "min_p": 0.1},
]


class Counted(TopLogits):
    """Counts the logits that were copied whole."""

    copied = 0

    def read(self, row: int, rows: int = 1) -> Array:
        self.copied += rows
        return super().read(row, rows)


def memory(place: Path, dtype: ir.DataType, kind: type[Any], logits: Array) -> Counted:
    ir.save(top_logits.choice_graph(VOCABULARY, dtype), place / "choice.onnx")
    ports = DecoderPorts("tokens", "lengths", "logits", (), 8, VOCABULARY)
    top = Counted("small", open_session(place / "choice.onnx"), ports, SLOTS, np.dtype(kind), "cpu")
    narrow = logits.view(np.uint32) >> 16 if dtype == ir.DataType.BFLOAT16 else logits
    device_rows.write(top._logits, np.ascontiguousarray(narrow.astype(kind)))
    return top


def any_logits(seed: int) -> Array:
    logits = (np.random.default_rng(seed).standard_normal((SLOTS, VOCABULARY)) * 6).astype(np.float32)
    logits[1, [5, 70]] = logits.max() + 1
    logits[2, ::3] = -np.inf
    return logits


@pytest.mark.parametrize(("dtype", "kind"), DTYPES, ids=str)
@pytest.mark.parametrize("scored", [True, False])
def test_tokens_are_those_of_whole_logits(tmp_path: Path, dtype: ir.DataType, kind: type[Any], scored: bool) -> None:
    top, rows, decided = memory(tmp_path, dtype, kind, any_logits(0)), [0, 1, 2, 3, 5], 0
    for seed in range(40):
        device_rows.write(top._logits, memory(tmp_path, dtype, kind, any_logits(seed))._logits.numpy())
        whole, top.copied = widened(device_rows.read(top._logits))[rows], 0
        pairs = [[Sampler(Sampling(seed=seed, **own), [1]) for own in SETTINGS] for _ in range(2)]
        pairs[0][3] = pairs[1][3] = None  # type: ignore[call-overload]  # a row that wants no token
        found, expected = choices(DeviceLogits(top, rows), pairs[0], scored), choices(whole, pairs[1], scored)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                token, own = mine(), theirs()
                assert token.id == own.id
                np.testing.assert_allclose(token.logprob, own.logprob, rtol=1e-5, atol=1e-5)
                assert np.isnan(token.logprob) == (not scored)
        decided += 4 - top.copied
    assert decided > 120


def test_no_logits_are_copied_where_none_are_needed(tmp_path: Path) -> None:
    top = memory(tmp_path, *DTYPES[0], any_logits(3))
    made = choices(DeviceLogits(top, range(2)), [Sampler(Sampling(), [1])] * 2, scored=True)
    assert [own().id for own in made if own is not None] == any_logits(3)[:2].argmax(-1).tolist()
    assert choices(DeviceLogits(top, range(2)), [None, None], scored=True) == [None, None]
    assert top.copied == 0
    choices(DeviceLogits(top, range(2)), [None, Sampler(Sampling(temperature=1), [1])], scored=True)
    assert top.copied == 2


def test_a_row_that_is_not_decided_copies_itself_alone(tmp_path: Path) -> None:
    logits = any_logits(4)
    logits[1], logits[2, 7], logits[3, 7] = 2.5, np.nan, np.inf
    top = memory(tmp_path, *DTYPES[0], logits)
    found = choices(DeviceLogits(top, range(4)), [Sampler(Sampling(), [1]) for _ in range(4)], scored=True)
    with np.errstate(invalid="ignore"):
        for place, choose in enumerate(found):
            assert choose is not None
            if place < 2:
                assert choose().id == logits[place].argmax()
                continue
            with pytest.raises(RunError, match="finite"):
                choose()
    assert top.copied == 3

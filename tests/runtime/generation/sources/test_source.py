"""Inputs beside tokens: what the source component takes, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.helpers.runtime.manifests import manifest
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.sources.source import SourceEncoder, digest

MEMORY = ("cross.0.key", "cross.0.value")
PORTS = DecoderPorts(
    "input_ids",
    "seqlens",
    "logits",
    (("past", "present"),),
    100,
    50,
    memory=MEMORY,
    memory_lengths="memory_lengths",
    source="encoder",
    source_outputs=MEMORY,
    start=7,
)
TEXT = (
    Port("input_ids", "int64", ("batch", "sequence"), below=40),
    Port("attention_mask", "int64", ("batch", "sequence")),
)
SOUND = (Port("input_features", "float32", ("batch", 2, 8)),)


def source(inputs: tuple[Port, ...] = TEXT, *, axis: int | str = "sequence", size: int = 5) -> SourceEncoder:
    outputs = tuple(Port(name, "float32", ("batch", 1, axis, 4)) for name in MEMORY)
    return SourceEncoder(PORTS, manifest(inputs, outputs), encode, size)


def encode(inputs: Mapping[str, np.ndarray[Any, Any]], version: Version) -> dict[str, np.ndarray[Any, Any]]:
    assert version.is_base
    keys = np.repeat(inputs["input_ids"][:, None, :, None], 4, axis=3).astype(np.float32)
    return {"cross.0.value": -keys, "last_hidden_state": keys[:, 0], "cross.0.key": keys}


def test_a_source_is_one_row_without_padding() -> None:
    request = source().prepare(GenerationRequest((), inputs={"input_ids": [3, 4, 5]}), "generate")
    assert request.prompt == (7,)
    assert request.inputs is not None
    arrays = {name: np.asarray(value) for name, value in request.inputs.items()}
    assert arrays["input_ids"].tolist() == [[3, 4, 5]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1]]
    keys, values = source().compute(arrays, Version.of_base({}))
    assert keys.shape == values.shape == (1, 3, 4)
    assert keys[0, :, 0].tolist() == [3, 4, 5] == (-values[0, :, 3]).tolist()


def test_a_prompt_of_the_caller_stays() -> None:
    assert source().prepare(GenerationRequest([9, 8], inputs={"input_ids": [3]}), "generate").prompt == [9, 8]


IDS = np.array([3, 4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "expected inputs of component 'encoder': input_ids, got none"),
        ({}, "got no 'input_ids'"),
        ({"pixels": IDS}, "got no 'input_ids', an unknown 'pixels'"),
        ({"input_ids": IDS, "pixels": IDS}, "an unknown 'pixels'"),
        ({"input_ids": IDS[None]}, r"input 'input_ids': expected shape \[sequence\], got \[1, 2\]"),
        ({"input_ids": "no"}, "expected an array of int64, got what numpy makes none of"),
        ({"input_ids": [[1], [2, 3]]}, "expected an array of int64, got what numpy makes none of"),
        ({"input_ids": IDS.astype(np.int32)}, "expected dtype int64, got int32"),
        ({"input_ids": np.array([], np.int64)}, "no empty axis"),
        ({"input_ids": [3, 40]}, "expected indices below 40"),
        ({"input_ids": [1] * 6}, "expected a source of at most 5 positions, got 6.*max_source"),
        ({"input_ids": IDS, "attention_mask": [1, 0]}, "'attention_mask' of ones, got zeros"),
        ({"input_ids": IDS, "attention_mask": [1]}, "sequence = 2"),
    ],
)
def test_other_inputs_are_refused(given: dict[str, object] | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        source().prepare(GenerationRequest((), inputs=given), "generate for prompt 3")
    assert "\n" not in str(caught.value)


def test_a_source_of_fixed_size_is_checked_by_its_shape() -> None:
    features = np.zeros((2, 8), np.float32)
    fixed = source(SOUND, axis=4, size=4)
    assert fixed.prepare(GenerationRequest((), inputs={"input_features": features}), "generate").inputs is not None
    with pytest.raises(InputError, match=r"expected shape \[batch, 2, 8\], got \[1, 2, 7\]"):
        fixed.prepare(GenerationRequest((), inputs={"input_features": features[:, 1:]}), "generate")


def test_a_digest_tells_inputs_apart() -> None:
    array = np.arange(6)
    several = [
        None,
        {},
        {"a": array},
        {"b": array},
        {"a": array.astype(np.int32)},
        {"a": array.reshape(2, 3)},
        {"a": array + 1},
        {"a": array, "b": array},
    ]
    assert len({digest(inputs) for inputs in several}) == len(several)
    assert digest({"a": array, "b": IDS}) == digest({"b": IDS.copy(), "a": np.arange(12)[::2] // 2})

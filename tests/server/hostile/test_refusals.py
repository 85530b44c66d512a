"""What clients send is never the server's own failure: uploads of any numbers are refused with 4xx, or served."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.helpers import nets
from tests.server.conftest import Served, upload
from tpeft_deploy import Adapter
from tpeft_deploy.errors import RunError, TpeftError
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.server.v2.statuses import status_of
from tpeft_deploy.tucker import Array

Parts = dict[str, bytes]
Random = random.Random
NUMBERS: list[object] = [
    *(10**400, -(10**400), 10**30, 1e308, float("inf"), float("nan"), 0, -1, 1e-320),
    *(None, True, "", "3", "nan", [], [2], {}, {"up": 2}),
]  # fmt: skip


def answer(served: Served, parts: Parts) -> int:
    """The status of an upload."""
    try:
        asyncio.run(served.service.register(served.who(), "bred", upload(**parts)))
    except TpeftError as error:  # any other is the server's own failure
        return status_of(error).http
    return 200


def canonical(seed: int) -> Parts:
    return {"weights": nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=seed).to_bytes()}


def lora(seed: int) -> Parts:
    numbers = np.random.default_rng(seed)
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (16, 2)}
    tensors = {f"base_model.model.up.{name}": numbers.standard_normal(s).astype("f") for name, s in shapes.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up"]}
    return {"weights": save(tensors), "config": json.dumps(config).encode()}


def other_numbers(parts: Parts, choice: Random) -> Parts:
    """Some values, or all of a tensor, become others."""
    length = int.from_bytes(parts["weights"][:8], "little")
    about = json.loads(parts["weights"][8 : 8 + length]).get("__metadata__")
    tensors = {name: array.copy() for name, array in load(parts["weights"]).items()}
    array: Array = tensors[choice.choice(sorted(tensors))]
    if array.dtype.kind == "f":
        value = choice.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e20, 1e-45, 0.0])
        array.reshape(-1)[: choice.choice([1, array.size])] = value
    return {**parts, "weights": save(tensors, metadata=about)}


def other_bits(parts: Parts, choice: Random) -> Parts:
    changed = bytearray(parts["weights"])
    for _ in range(choice.randint(1, 4)):
        changed[choice.randrange(len(changed))] ^= 1 << choice.randrange(8)
    return {**parts, "weights": bytes(changed)}


def other_settings(parts: Parts, choice: Random) -> Parts:
    if "config" not in parts:
        return other_numbers(parts, choice)
    config = json.loads(parts["config"])
    for name in choice.sample(["r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias", "use_dora"], 2):
        config[name] = choice.choice(NUMBERS)
    return {**parts, "config": json.dumps(config).encode()}


CHANGES: list[Callable[[Parts, Random], Parts]] = [other_settings, other_numbers, other_bits]  # in this order


def test_bred_uploads_are_served_or_refused(served: Served) -> None:
    found: Counter[int] = Counter()
    for seed in range(150):
        choice = Random(seed)
        parts = choice.choice([canonical, lora])(seed)
        for change in sorted(choice.choices(CHANGES, k=choice.randint(1, 2)), key=CHANGES.index):
            parts = change(parts, choice)
        found[answer(served, parts)] += 1
    assert set(found) <= {200, 400}
    assert found[200] > 5
    assert found[400] > 50


@pytest.mark.parametrize("value", [one for one in NUMBERS[:6] if one != 10**30])
@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_number_that_no_float_holds_is_refused(served: Served, name: str, value: object) -> None:
    parts = lora(0)
    config = json.loads(parts["config"]) | {name: value}
    assert answer(served, {**parts, "config": json.dumps(config).encode()}) == 400


def test_a_probe_that_is_not_finite_is_refused(served: Served) -> None:
    adapter = nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=0)
    delta = adapter.deltas["up.weight"]
    core = np.full_like(delta.core, 3e38)
    huge = Adapter({"up.weight": type(delta)(core, delta.factors, delta.scale)}, base_digests=adapter.base_digests)
    assert answer(served, {"weights": huge.to_bytes()}) == 400
    assert "acme/bred@1" not in served.runtime.tasks


@pytest.mark.parametrize(
    "error", [OverflowError("int too large"), ValueError("shapes"), KeyError("up"), ZeroDivisionError(), TypeError()]
)
def test_what_an_adapter_makes_arithmetic_raise_is_told_in_one_line(
    served: Served, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: object) -> bool:
        raise error

    monkeypatch.setattr(served.runtime, "probe", raising)
    assert answer(served, canonical(0)) == 400
    assert not served.runtime.residency().keys() & {"acme/bred@1"}
    assert not list(served.state.tasks._blobs._files())  # type: ignore[attr-defined]


def test_a_run_that_only_the_adapter_breaks_is_its_own_fault(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    run = served.runtime._part(None).engine.run_banked

    def breaking(inputs: dict[str, Array], version: Version) -> object:
        if version.is_base:
            return run(inputs, version)
        raise RunError("run bundle", problem="an exponent too large") from RuntimeError()

    monkeypatch.setattr(served.runtime._part(None).engine, "run_banked", breaking)
    assert answer(served, canonical(0)) == 400


def test_a_task_that_cannot_be_folded_stays_pinned_and_is_no_failure(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(served, canonical(0)) == 200

    def differing(*_: object, task: str, **__: object) -> float:
        raise RunError(f"fold task {task!r}", expected="the answer of the banked graph", got="another")

    monkeypatch.setattr("tpeft_deploy.runtime.folding.compare.prove", differing)
    with pytest.raises(TpeftError) as refused:
        asyncio.run(served.service.pin(served.who(), "bred", folded=True))
    assert status_of(refused.value).http == 409
    (pin,) = served.state.placements.pins()
    assert (pin.task, pin.folded) == ("bred", False)
    assert served.runtime.pins() == {"acme/bred@1": False}

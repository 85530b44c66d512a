"""Adapters that the runtime knows before it reads them, and requests with a task per row."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.counting import operations
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import AdapterError, BundleError, CapacityError, UnknownTask
from tpeft_deploy.runtime import Limits, Source
from tpeft_deploy.runtime.batching.timing import Timing

INPUTS = {"pixels": np.random.default_rng(0).standard_normal((4, 1, 12, 14)).astype(np.float32)}


def source(adapter: Adapter, on_read: Callable[[], None] = lambda: None) -> Source:
    def read() -> Adapter:
        on_read()
        return adapter

    return Source(hashlib.sha256(adapter.to_bytes()).hexdigest(), read)


@pytest.fixture
def runtime(conv_bundle: Bundle) -> Runtime:
    return Runtime(conv_bundle.path, provider="cpu", threads=1)


def same(got: object, expected: object) -> None:
    if isinstance(expected, list):
        assert isinstance(got, list)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # type: ignore[call-overload]


def test_a_registered_adapter_is_read_when_it_is_asked_for(runtime: Runtime, conv_adapters: dict[str, Adapter]) -> None:
    reads: list[int] = []
    runtime.register({"acme/mood@3": source(conv_adapters["two"], lambda: reads.append(1))})
    assert not reads
    same(runtime.run(INPUTS, "acme/mood@3")["logits"], runtime.run(INPUTS, "two")["logits"])
    runtime.run(INPUTS, "acme/mood@3")
    assert reads == [1]
    runtime.forget(["acme/mood@3"])
    with pytest.raises(UnknownTask):
        runtime.run(INPUTS, "acme/mood@3")


@pytest.mark.parametrize("name", ["base", "conv", "a/b", "a/b@0", "/b@", "../b@1", "a/b@1/c@2", "a b", "a/@1"])
def test_names_that_are_not_allowed_register_nothing(
    runtime: Runtime, conv_adapters: dict[str, Adapter], name: str
) -> None:
    own = source(conv_adapters["two"])
    with pytest.raises(BundleError):
        runtime.register({"fine": own, name: own})
    assert "fine" not in runtime.tasks


def test_forgetting_one_that_is_unknown_forgets_none(runtime: Runtime, conv_adapters: dict[str, Adapter]) -> None:
    runtime.register({"new": source(conv_adapters["two"])})
    with pytest.raises(UnknownTask, match="'other'"):
        runtime.forget(["new", "other"])
    assert "new" in runtime.tasks


def test_ten_thousand_are_registered_at_the_cost_of_each(runtime: Runtime, conv_adapters: dict[str, Adapter]) -> None:
    own = source(conv_adapters["two"])
    few, many = ({f"acme/{count}-{number}@1": own for number in range(count)} for count in (1000, 9000))
    cost = operations(lambda: runtime.register(few))
    assert operations(lambda: runtime.register(many)) < 9 * 1.1 * cost  # none looks at all others
    assert len(runtime.tasks) == 10_000 + 4


def test_a_probe_tells_an_adapter_that_does_nothing(runtime: Runtime, conv_adapters: dict[str, Adapter]) -> None:
    head = {name: p.detach().numpy() for name, p in nets.conv_net()[0].named_parameters() if name.startswith("head.")}
    steep = {name: np.full_like(array, 3e38) for name, array in head.items()}
    runtime.register(
        {
            "change": source(conv_adapters["two"]),
            "nothing": source(Adapter({}, overrides={"head.bias": head["head.bias"]})),
            "overflow": source(Adapter({}, overrides=steep)),
        }
    )
    assert runtime.probe("change")
    assert not runtime.probe("nothing")
    with pytest.raises(AdapterError, match=r"'overflow'.*finite"):
        runtime.probe("overflow")


def test_rows_of_a_request_have_their_own_tasks_and_share_a_run_with_others(conv_bundle: Bundle) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", threads=1, limits=Limits(max_delay=0.2))
    tasks = ["two", "base", "wide", "partial"]
    expected = runtime.run(INPUTS, tasks=tasks)
    alone = runtime.run(INPUTS, "plain")

    async def main() -> None:
        timings = [Timing(time.monotonic()) for _ in range(3)]
        mixed, single, again = await asyncio.gather(
            runtime.infer(INPUTS, tasks=tasks, timing=timings[0]),
            runtime.infer(INPUTS, "plain", timing=timings[1]),
            runtime.infer(INPUTS, tasks=tasks, timing=timings[2], tenant="acme", priority=1),
        )
        for name, array in expected.items():
            same(mixed[name], array)
            same(again[name], array)
            same(single[name], alone[name])
        for timing in timings:
            assert 0 < timing.arrived <= timing.began < timing.ended
            assert timing.rows in {4, 8, 12}

    asyncio.run(main())
    one = asyncio.run(runtime.infer({"pixels": INPUTS["pixels"][:1]}, tasks=["two"]))
    same(one["logits"], runtime.run({"pixels": INPUTS["pixels"][:1]}, tasks=["two"])["logits"])


def test_more_tasks_than_fit_at_once_are_answered_in_parts(conv_bundle: Bundle) -> None:
    whole = Runtime(conv_bundle.path, provider="cpu", threads=1)
    tasks = ["two", "plain", "wide", "partial"]
    expected = whole.run(INPUTS, tasks=tasks)
    size = whole._residency._bank.row_bytes
    small = Runtime(conv_bundle.path, provider="cpu", threads=1, device_bytes=3 * size, preload=False)
    got = asyncio.run(small.infer(INPUTS, tasks=tasks, timeout=100))
    for name, array in expected.items():
        same(got[name], array)
    none = Runtime(conv_bundle.path, provider="cpu", threads=1, device_bytes=size, preload=False)
    with pytest.raises(CapacityError):
        asyncio.run(none.infer(INPUTS, tasks=tasks))


def test_a_probe_is_not_misled_by_the_session_that_the_base_has_of_its_own(
    runtime: Runtime, conv_adapters: dict[str, Adapter]
) -> None:
    bias = nets.conv_net()[0].get_parameter("head.bias").detach().numpy()
    runtime.register({"nothing": source(Adapter({}, overrides={"head.bias": bias}))})
    runtime._part(None).folds.begin(runtime._versions.base).result()
    runtime.run(INPUTS)
    assert not runtime.probe("nothing")
    assert runtime.probe("two")
    with pytest.raises(UnknownTask):
        runtime.probe("other")


def test_nobody_is_told_the_names_of_tasks_that_belong_to_tenants(
    runtime: Runtime, conv_adapters: dict[str, Adapter]
) -> None:
    runtime.register({"acme/secret@1": source(conv_adapters["two"])})
    with pytest.raises(UnknownTask) as caught:
        runtime.run(INPUTS, "other")
    assert "two" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_registered_again_unchanged_goes_on_as_it_is(
    runtime: Runtime, conv_adapters: dict[str, Adapter]
) -> None:
    reads: list[int] = []
    own = source(conv_adapters["two"], lambda: reads.append(1))
    for _ in range(2):
        runtime.register({"acme/mood@1": own})
        runtime.run(INPUTS, "acme/mood@1")
    assert reads == [1]
    runtime.pin("acme/mood@1")
    runtime.register({"acme/mood@1": source(conv_adapters["wide"])})
    same(runtime.run(INPUTS, "acme/mood@1")["logits"], runtime.run(INPUTS, "wide")["logits"])
    version = runtime._versions.find("acme/mood@1")
    assert version.pinned


def test_ten_thousand_are_forgotten_at_the_cost_of_each(runtime: Runtime, conv_adapters: dict[str, Adapter]) -> None:
    own = source(conv_adapters["two"])
    names = [f"acme/task-{number}@1" for number in range(10_000)]
    runtime.register(dict.fromkeys(names, own))
    for strength in range(1, 200):
        runtime._versions.find({"two": strength / 1000})
    cost = operations(lambda: runtime.forget(names[:1000]))
    assert operations(lambda: runtime.forget(names[1000:])) < 9 * 1.1 * cost
    assert runtime.tasks == ["partial", "plain", "two", "wide"]

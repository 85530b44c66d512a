from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.helpers.runtime.decoders import FakeDecoder
from tests.helpers.runtime.generators import Held, generating
from tests.helpers.waiting import SECONDS, wait_until
from tests.server.conftest import Served
from tpeft_deploy.errors import Forbidden, InputError, NotFound, ProtocolError
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.loop import Generator
from tpeft_deploy.runtime.generation.sampling import Sampling
from tpeft_deploy.runtime.server.operations.generation import ContextExceeded, Generations, GenerationTarget
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.tenancy.access import Principal
from tpeft_deploy.runtime.server.tenancy.meter import Meter
from tpeft_deploy.runtime.server.tenancy.quotas import Quota


def test_a_models_name_is_a_task_a_version_the_base_or_a_weighted_set(served: Served) -> None:
    own, who = served.service.generations, served.who("acme", "infer")
    for name in ("base", served.bundle.manifest.name):
        assert own.target(who, name).task is None
    assert own.target(who, "two").task == own.target(who, "two@1").task == "two"
    found = own.target(who, "two:0.5+plain:-1")
    assert found.task == {"two": 0.5, "plain": -1.0}
    assert [version.task for version in found.versions] == ["two", "plain"]
    assert own.target(who, "two:2").task == {"two": 2.0}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nobody", NotFound),
        ("two@7", NotFound),
        ("two:1+nobody:1", NotFound),
        ("two+plain", ProtocolError),
        ("two:x+plain:1", ProtocolError),
        ("two:nan+plain:1", ProtocolError),
        ("two:1+two:2", ProtocolError),
        ("+", ProtocolError),
    ],
)
def test_other_names_are_refused(served: Served, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        served.service.generations.target(served.who("acme", "infer"), name)


def test_a_role_without_inference_is_refused(served: Served) -> None:
    nobody: Any = type("Nobody", (Principal,), {"actions": ()})
    with pytest.raises(Forbidden):
        served.service.generations.target(nobody("acme", served.who().role, "k"), "two")


def test_a_sequence_has_room_for_so_many_tokens(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    own = served.service.generations
    monkeypatch.setattr(Generations, "most_tokens", 10)
    assert own.room([1] * 4, None) == 6
    assert own.room([1] * 4, None, 3) == 3
    assert own.room([1] * 9, None, 16) == 1
    assert own.room([1] * 4, 6) == 6
    with pytest.raises(ContextExceeded):
        own.room([1] * 4, 7)
    with pytest.raises(ContextExceeded):
        own.room([1] * 10, None)
    assert issubclass(ContextExceeded, InputError)


class OnlyGenerator:
    """A runtime that does nothing but generate, behind a gate."""

    def __init__(self, generator: Generator, gate: Held) -> None:
        self.generator = generator
        self.gate = gate

    async def start(self, request: GenerationRequest, task: object) -> list[Handle]:
        handles = self.generator.submit_choices(request)
        self.gate.go_on.set()
        return handles


def test_sequences_that_are_left_generate_one_token_more_at_most_and_give_the_others_back(served: Served) -> None:
    gate, held, events = Held("prefill"), Held("decode"), list[InferenceEvent]()
    who, target = served.who("acme", "infer"), GenerationTarget("two", "two", ())
    request = GenerationRequest([5, 6, 7], 100, Sampling(n=2))
    decoder = FakeDecoder(4, before=gate)
    with generating(decoder) as (generator, _):
        generator.submit(GenerationRequest([1], 1))  # so that those that come meanwhile begin in one step
        assert gate.reached.wait(SECONDS)
        decoder.before = held
        meter = Meter(lambda _: Quota(tokens_per_min=210))
        runtime: Any = OnlyGenerator(generator, gate)
        own = Generations(runtime, served.bundle, served.service._models, meter, bool, events.append, runtime)

        async def leave() -> None:
            async with own.started(who, target, [request]) as handles:
                for handle in handles:
                    await anext(aiter(handle))
                assert own.rates(who)["tokens"].remaining < 150
                await asyncio.to_thread(held.reached.wait, SECONDS)
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(leave())
        held.go_on.set()
        wait_until(lambda: not generator.stats().running, "that they end")
        wait_until(lambda: generator._worker is None or not generator._stepping, "the step that ran")
        assert generator.stats().generated_tokens <= 1 + 4
        assert own.rates(who)["tokens"].remaining >= 210 - 3 - 4
    [event] = events
    assert event.failed
    assert event.generation is not None
    assert event.generation.prompt_tokens == 3
    assert [len(times) for times in event.generation.times] == [1, 1]

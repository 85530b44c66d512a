from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.runtime.decoders import VOCABULARY, FakeDecoder, alone
from tests.helpers.runtime.generators import Held, generating, ids
from tests.helpers.waiting import SECONDS, wait_until
from tpeft_deploy.errors import InputError, RunError
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.sampling import Token


def test_tokens_come_one_by_one_and_a_raised_callback_harms_nobody() -> None:
    seen: list[Token] = []

    def bad(token: Token) -> None:
        seen.append(token)
        raise ValueError("mine")

    request = GenerationRequest([5], 6)
    with generating(FakeDecoder(2)) as (generator, _):
        handle, other = generator.submit(request, bad), generator.submit(GenerationRequest([6], 6))
        assert handle.result(SECONDS).tokens == seen == alone(request)
        assert other.result(SECONDS).reason == "length"


def test_a_callback_may_cancel_and_submit() -> None:
    handles: list[Handle] = []
    with generating(FakeDecoder(1)) as (generator, _):

        def stop(_token: Token) -> None:
            if len(handles) == 1:
                handles[0].cancel()
                handles.append(generator.submit(GenerationRequest([6], 2)))

        gate = Held("prefill")
        generator._decoder.before = gate  # type: ignore[attr-defined]
        handles.append(generator.submit(GenerationRequest([5], 60), stop))
        gate.go_on.set()
        wait_until(lambda: len(handles) == 2)
        assert handles[0].future.cancelled()
        assert len(ids(handles[1])) == 2


def test_tokens_can_be_iterated_over_in_several_event_loops() -> None:
    request = GenerationRequest([5], 12)

    async def collect(handle: Handle) -> list[Token]:
        return [token async for token in handle]

    with generating(FakeDecoder(1)) as (generator, _):
        handle, found = generator.submit(request), list[list[Token]]()
        threads = [threading.Thread(target=lambda: found.append(asyncio.run(collect(handle)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert found == [alone(request)] * 3


def test_an_iteration_ends_with_the_error_or_the_cancellation() -> None:
    held = Held("decode")

    async def iterate(handle: Handle, then: Callable[[], object]) -> None:
        async for _ in handle:
            then()

    with generating(FakeDecoder(1, before=held)) as (generator, _):
        handle = generator.submit(GenerationRequest([5], 12))
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(iterate(handle, handle.cancel))
        held.go_on.set()
    with generating(FakeDecoder(1)) as (generator, _):
        handle = generator.submit(GenerationRequest([5], 120))
        generator.close()
        with pytest.raises(RunError, match="closed"):
            asyncio.run(iterate(handle, lambda: None))


def test_a_cancelled_task_cancels_its_sequence() -> None:
    held = Held("decode")

    async def give_up(handle: Handle) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(handle.future), 0.001)

    with generating(FakeDecoder(1, before=held)) as (generator, _):
        handle = generator.submit(GenerationRequest([5], 60))
        assert held.reached.wait(SECONDS)
        asyncio.run(give_up(handle))
        held.go_on.set()
        assert handle.future.cancelled()


BAD: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [VOCABULARY]},
    {"prompt": [-1]},
    {"prompt": ["a"]},
    {"prompt": [[1]]},
    {"max_new_tokens": 1.5},
    {"max_new_tokens": 0},
    {"prompt": [1] * 100, "max_new_tokens": 30},
    {"sampling": Sampling(stop_strings=["x"])},
    {"sampling": Sampling(stop_tokens=[VOCABULARY])},
]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_what_the_decoder_cannot_run_is_refused(settings: dict[str, Any]) -> None:
    with generating(FakeDecoder(1)) as (generator, versions):
        with pytest.raises(InputError) as caught:
            generator.submit(GenerationRequest(**{"prompt": [1], **settings}))
        assert "\n" not in str(caught.value)
        assert not versions.all

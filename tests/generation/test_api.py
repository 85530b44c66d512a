"""`Runtime.generate` and `Runtime.stream`: refusals, neighbours, and changes of adapters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from tests.helpers.waiting import SECONDS, wait_until
from tpeft_deploy import Adapter, Bundle, Runtime, Sampling
from tpeft_deploy.errors import CapacityError, DeadlineExceeded, InputError, RunError, TpeftError, UnknownTask
from tpeft_deploy.runtime.generation.decoder import BankedDecoder
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.top_logits.device_logits import DeviceLogits
from tpeft_deploy.runtime.sessions.banked import Session

PROMPT = [5, 9, 31, 7, 12]
LONG = 900


def opened(bundle: Bundle, **settings: Any) -> Runtime:
    return Runtime(bundle.path, **{"provider": "cpu", "threads": 1, "max_tokens": 1024, **settings})


class Gate:
    """A detokeniser that stops the generator at the second token."""

    def __init__(self) -> None:
        self.go_on, self.tokens = threading.Event(), 0

    def push(self, _token: int) -> str:
        self.tokens += 1
        assert self.tokens == 1 or self.go_on.wait(SECONDS)
        return ""

    def flush(self) -> str:
        return ""


async def stopped(runtime: Runtime, task: str, then: Callable[[], object], count: int = 40) -> list[int]:
    """All tokens of a sequence; something happens after the first."""
    found: list[int] = []
    gate = Gate()
    try:
        async for token in runtime.stream(PROMPT, task, max_new_tokens=count, text=lambda: gate):
            if not found:
                await asyncio.to_thread(then)
                gate.go_on.set()
            found.append(token.id)
    finally:
        gate.go_on.set()
    return found


def test_sampled_tokens_do_not_depend_on_neighbours(llama_bundle: Bundle) -> None:
    how = Sampling(temperature=0.8, top_p=0.95, seed=3)
    with opened(llama_bundle) as runtime:
        alone = runtime.generate([PROMPT], "a", max_new_tokens=40, sampling=how)
        many = [PROMPT, [1], PROMPT, [7] * 30]
        beside = runtime.generate(many, tasks=["b", "base", "a", "b"], max_new_tokens=40, sampling=how)
        assert beside[2] == alone[0]
        assert beside[0] != beside[2]
        assert runtime.generate([PROMPT], "a", max_new_tokens=40, sampling=Sampling(temperature=0.8)) != alone


def test_a_sequence_ends_on_the_version_that_it_began_with(
    llama_bundle: Bundle, llama_adapters: Mapping[str, Adapter]
) -> None:
    with opened(llama_bundle) as runtime:
        old, new = (runtime.generate([PROMPT], task, max_new_tokens=40)[0] for task in ("a", "b"))
        found = asyncio.run(stopped(runtime, "a", lambda: runtime.load("a", llama_adapters["b"])))
        assert found == old != new
        assert runtime.generate([PROMPT], "a", max_new_tokens=40)[0] == new
        assert runtime.usage()["rows_taken"] == 2


def test_the_bank_may_be_replaced_under_a_sequence(llama_bundle: Bundle, llama_adapters: Mapping[str, Adapter]) -> None:
    with opened(llama_bundle, preload=False) as runtime:
        runtime.unload("b")
        expected = runtime.generate([PROMPT], "a", max_new_tokens=40)[0]
        bank = runtime._residency._bank
        # Of a larger rank than "a".
        found = asyncio.run(stopped(runtime, "a", lambda: runtime.load("b", llama_adapters["b"])))
        assert found == expected
        assert runtime._residency._bank is not bank


def test_weighted_sets_are_tasks(llama_bundle: Bundle) -> None:
    with opened(llama_bundle) as runtime:
        both, same, own = runtime.generate([PROMPT] * 3, tasks=[{"a": 0.5, "b": 0.5}, {"a": 1.0}, "a"])
        assert same == own != both


def test_known_prefixes_are_not_computed_again(llama_bundle: Bundle) -> None:
    draw = np.random.default_rng(0)
    prefix = draw.integers(50, size=500).tolist()
    prompts = [[*prefix, *draw.integers(50, size=5).tolist()] for _ in range(50)]
    with opened(llama_bundle, prefix_bytes=0) as runtime:
        expected = runtime.generate(prompts, "a", max_new_tokens=6)
        assert runtime.usage()["prefix_bytes"] == 0
    with opened(llama_bundle) as runtime:
        found = runtime.generate(prompts[:1], "a", max_new_tokens=6)
        found += runtime.generate(prompts[1:], "a", max_new_tokens=6)
        assert found == expected
        stats = runtime.generation()
        assert stats is not None
        assert stats.reused_tokens == 49 * 496
        assert stats.prefilled_tokens == 505 + 49 * 9
        assert runtime.usage()["prefix_bytes"] >= 31 * 16 * 2 * 2 * 8 * 4
        runtime.unload("a")
        wait_until(lambda: runtime.usage()["prefix_bytes"] == 0)


REFUSED: list[tuple[dict[str, Any], type[TpeftError], str]] = [
    ({"prompts": [PROMPT, []]}, InputError, "at least one token"),
    ({"prompts": [[3, 50]]}, InputError, "tokens from 0 to 49, got 50"),
    ({"prompts": [[-1]]}, InputError, "tokens from 0 to 49"),
    ({"prompts": [[1] * 30], "max_new_tokens": 8}, InputError, "at most 33 tokens in all"),
    ({"prompts": [[1] * 40]}, InputError, "Shorten the prompt"),
    ({"prompts": [PROMPT], "max_new_tokens": 0}, InputError, "at least 1"),
    ({"prompts": [PROMPT], "task": "c"}, UnknownTask, "for prompt 0: expected one of base, a, b, got 'c'"),
    ({"prompts": [PROMPT], "task": 3}, InputError, "a task's name"),
    ({"prompts": [PROMPT], "tasks": ["a", "b"]}, InputError, "one task per prompt, 1, got 2 tasks"),
    ({"prompts": [PROMPT], "tasks": "a"}, InputError, "got 'a'"),
    ({"prompts": [PROMPT], "task": "a", "tasks": ["a"]}, InputError, "got both"),
    ({"prompts": [PROMPT], "stop": [50]}, InputError, "to 49"),
    ({"prompts": [PROMPT], "sampling": Sampling(n=2)}, InputError, "n of 1"),
    ({"prompts": [PROMPT], "sampling": Sampling(stop_strings=["x"])}, InputError, "no tokenizer"),
]


def test_what_cannot_be_generated_is_refused_in_one_line(llama_bundle: Bundle) -> None:
    with opened(llama_bundle, max_tokens=32) as runtime:
        for arguments, error, told in REFUSED:
            with pytest.raises(error) as caught:
                runtime.generate(**{"max_new_tokens": 4, **arguments})
            assert told in str(caught.value)
            assert "\n" not in str(caught.value)
        stats = runtime.generation()
        assert stats is not None
        assert stats.steps == 0
        assert runtime.generate([]) == []
    with pytest.raises(RunError, match="closed"):
        runtime.generate([PROMPT])


def test_sizes_that_do_not_fit_are_refused(llama_bundle: Bundle, conv_bundle: Bundle) -> None:
    with pytest.raises(CapacityError, match="room for a sequence of 1,024 tokens"):
        opened(llama_bundle, kv_bytes=1000)
    with pytest.raises(InputError, match="max_tokens from 1 to 1024"):
        opened(llama_bundle, max_tokens=1025)
    with Runtime(conv_bundle.path, provider="cpu") as runtime:
        with pytest.raises(InputError, match="generation=True"):
            runtime.generate([PROMPT])
        assert runtime.generation() is None
        assert "slots" not in runtime.usage()


def test_stop_tokens_end_a_sequence(llama_bundle: Bundle) -> None:
    with opened(llama_bundle) as runtime:
        whole = runtime.generate([PROMPT], "a", max_new_tokens=30)[0]
        stop = whole[10]
        assert runtime.generate([PROMPT], "a", max_new_tokens=30, stop=[stop])[0] == whole[: whole.index(stop) + 1]


def test_closing_the_iterator_ends_the_sequence(llama_bundle: Bundle) -> None:
    async def leave(runtime: Runtime) -> None:
        gate = Gate()
        async with aclosing(runtime.stream(PROMPT, "a", text=lambda: gate)) as tokens:
            async for token in tokens:
                assert token.logprob < 0
                break
        gate.go_on.set()

    with opened(llama_bundle) as runtime:
        asyncio.run(leave(runtime))
        wait_until(lambda: runtime.usage()["slots_taken"] == 0)
        stats = runtime.generation()
        assert stats is not None
        assert stats.cancelled == 1
        # Released once the step has ended that may use it.
        wait_until(lambda: not any(version.users for version in runtime._residency._resident))


def test_closing_the_runtime_ends_sequences_with_an_error(llama_bundle: Bundle) -> None:
    runtime = opened(llama_bundle)
    closing = threading.Thread(target=runtime.close)

    def close() -> None:
        generator = runtime._generation._made
        assert generator is not None
        closing.start()
        wait_until(lambda: not generator._records)

    with pytest.raises(RunError, match="the runtime is closed"):
        asyncio.run(stopped(runtime, "a", close))
    closing.join(SECONDS)
    assert runtime.usage()["kv_bytes"] == 0


def test_a_deadline_ends_a_sequence(llama_bundle: Bundle) -> None:
    with opened(llama_bundle) as runtime, pytest.raises(DeadlineExceeded):
        runtime.generate([PROMPT], timeout=0, max_new_tokens=LONG)


def one_adapter(bundle: Bundle) -> Runtime:
    """A runtime with room for one adapter beside the base."""
    with opened(bundle) as runtime:
        size = 2 * runtime._residency._bank.row_bytes
    return opened(bundle, device_bytes=size, preload=False)


def test_more_tasks_than_rows_are_generated_one_after_the_other(llama_bundle: Bundle) -> None:
    tasks = ["a", "b", "base", "a", "b"]
    with opened(llama_bundle) as runtime:
        expected = runtime.generate([PROMPT] * 5, tasks=tasks, max_new_tokens=20)
    with one_adapter(llama_bundle) as runtime:
        assert runtime.generate([PROMPT] * 5, tasks=tasks, max_new_tokens=20) == expected


def test_nothing_waits_until_a_sequence_ends(llama_bundle: Bundle, llama_adapters: Mapping[str, Adapter]) -> None:
    refused: list[str] = []

    def ask(runtime: Runtime) -> None:
        for call in (
            lambda: runtime.load("c", llama_adapters["b"]),
            lambda: runtime.generate([PROMPT], "b"),
        ):
            with pytest.raises(CapacityError, match="sequences are generated on") as caught:
                call()
            refused.append(str(caught.value))

    with one_adapter(llama_bundle) as runtime:
        assert len(asyncio.run(stopped(runtime, "a", lambda: ask(runtime)))) == 40
        assert len(refused) == 2
        wait_until(lambda: not runtime._versions.find("a").occupied)  # soon after its last token
        runtime.load("c", llama_adapters["b"])


def test_callers_share_steps_and_a_request_may_have_choices(llama_bundle: Bundle) -> None:
    async def choices(runtime: Runtime) -> list[list[int]]:
        request = GenerationRequest(PROMPT, 5, Sampling(temperature=2, seed=1, n=3), task="a")
        handles = await runtime.start(request)
        return [[token.id async for token in handle] for handle in handles]

    with opened(llama_bundle) as runtime:
        found = asyncio.run(choices(runtime))
        assert len({tuple(tokens) for tokens in found}) == 3
        threads = [threading.Thread(target=runtime.generate, args=([PROMPT],)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        stats = runtime.generation()
        assert stats is not None
        assert stats.finished == 7


@pytest.mark.parametrize("kept", [False, True], ids=["on the host", "on the device"])
def test_slots_with_a_gap_decode_as_those_without(llama_bundle: Bundle, kept: bool) -> None:
    with opened(llama_bundle) as runtime:
        service = runtime._generation
        assert service._plan is not None
        part = runtime._part(None)
        session = part.session
        assert isinstance(session, Session)
        choice = part.open_choice() if kept else None
        decoder = BankedDecoder(part.manifest, session, runtime._residency, service._plan, "cpu", choice=choice)
        versions = [service.acquire(task) for task in ("a", "b")]
        prompt, token = np.array(PROMPT), np.array([4, 4])
        found = []
        for slots in ([0, 1], [1, 3]):
            for slot, version in zip(slots, versions, strict=True):
                decoder.prefill([slot], prompt[None, :2], 0, [version])
                decoder.prefill([slot], prompt[None, 2:], 2, [version])
            logits = decoder.decode(slots, token, np.full(2, len(prompt)), versions)
            assert isinstance(logits, DeviceLogits) == kept
            found.append(logits.read() if isinstance(logits, DeviceLogits) else logits.copy())
        np.testing.assert_array_equal(found[0], found[1])
        assert not np.allclose(found[0][0], found[0][1])
        for version in versions:
            version.release()


def plain_inputs(runtime: Runtime, rows: int, chunk: int, length: int) -> dict[str, Any]:
    ports = runtime._part(None).manifest.inputs
    caches = {
        p.name: np.zeros((rows, int(p.shape[1]), 16, int(p.shape[3])), p.dtype) for p in ports if len(p.shape) == 4
    }
    tokens = np.ones((rows, chunk), np.int64)
    return {"input_ids": tokens, "seqlens": np.full(rows, length), **caches}


def test_a_process_that_only_generates_opens_one_graph(llama_bundle: Bundle) -> None:
    with opened(llama_bundle) as runtime:
        session = runtime._part(None).session
        assert isinstance(session, Session)
        assert runtime.generate([PROMPT], "a", max_new_tokens=2)
        assert not session.is_open
        assert runtime.run(plain_inputs(runtime, 1, 2, 0), task="a")
        assert session.is_open


def test_runs_that_the_operator_does_not_define_are_refused(llama_bundle: Bundle) -> None:
    with opened(llama_bundle) as runtime:
        for rows, chunk, length, told in (
            (2, 3, 1, "one row, or one token of each"),
            (1, 3, 14, "lengths from 0 to 13, got 14 to 14"),
            (1, 1, -1, "lengths from 0 to 15"),
        ):
            with pytest.raises(InputError, match=told):
                runtime.run(plain_inputs(runtime, rows, chunk, length))
        assert runtime.run(plain_inputs(runtime, 2, 3, 0), "a")["logits"].shape == (2, 50)
        assert runtime.probe("a")


def test_requests_of_a_decoder_are_not_joined(llama_bundle: Bundle) -> None:
    async def both(runtime: Runtime) -> list[Any]:
        asked = [runtime.infer(plain_inputs(runtime, 1, 3, length), "a") for length in (0, 4)]
        return await asyncio.gather(*asked)

    with opened(llama_bundle) as runtime:
        found = asyncio.run(both(runtime))
        for length, own in zip((0, 4), found, strict=True):
            expected = runtime.run(plain_inputs(runtime, 1, 3, length), "a")["logits"]
            np.testing.assert_array_equal(own["logits"], expected)

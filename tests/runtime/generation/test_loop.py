from __future__ import annotations

import math
import random
import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from tests.helpers.runtime.decoders import VOCABULARY, FakeDecoder, FakeHeld, FakeVersions, alone
from tests.helpers.runtime.generators import Held, generating, ids
from tests.helpers.waiting import SECONDS
from tpeft_deploy.errors import DeadlineExceeded, QueueFull, RunError
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.loop import Generator
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair
from tpeft_deploy.tucker import Array


class Letters:
    """A detokeniser: token 0 is "a", and so on; holds one token back."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        text, self.held = self.held, chr(ord("a") + token % 26)
        return text

    def flush(self) -> str:
        return self.held


def any_request(draw: random.Random) -> GenerationRequest:
    start = [draw.randint(0, 3) for _ in range(2)] * draw.randint(0, 20)  # many have these in common
    sampled: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": draw.randint(0, 9), "repetition_penalty": 1.1}
    return GenerationRequest(
        [*start, *(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 6)))],
        max_new_tokens=draw.randint(1, 25),
        sampling=Sampling(stop_tokens=[7], **draw.choice([{}, sampled])),
        task=draw.choice(["base", "one", "two"]),
        tenant=draw.choice(["x", "y"]),
        public=draw.random() < 0.3,
        priority=draw.choice([0, 0, 1]),
        inputs=draw.choice([None, None, {"image": np.array([1])}, {"image": np.array([2])}]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_every_sequence_has_the_tokens_that_it_has_alone(seed: int) -> None:
    draw = random.Random(seed)
    decoder = FakeDecoder(draw.randint(1, 6))
    limits = {"budget": decoder.slots + draw.randint(0, 30), "chunk": draw.randint(1, 20)}
    requests = [any_request(draw) for _ in range(80)]
    kept: dict[int, Handle] = {}
    with generating(decoder, prefix_bytes=draw.choice([0, 3000, 10**6]), **limits) as (generator, _):
        for index, request in enumerate(requests):
            kept[index] = generator.submit(request)
            if draw.random() < 0.2:
                kept.pop(draw.choice(list(kept))).cancel()
            if draw.random() < 0.3 and index in kept:
                kept[index].result(SECONDS)
        for index, handle in kept.items():
            result, expected = handle.result(SECONDS), alone(requests[index])
            assert result.tokens == expected
            assert result.reason == ("stop" if expected[-1].id == 7 else "length")
        assert decoder.most_tokens <= limits["chunk"]
        figures = generator.stats()
        assert figures.cached_prefix_bytes == 0 or figures.reused_tokens > 0
        assert figures.finished + figures.cancelled == 80
        assert figures.failed == 0


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened() -> None:
    held = Held("decode")
    decoder = FakeDecoder(1, before=held)
    low = GenerationRequest([1, 2], 20, Sampling(temperature=1, seed=1), priority=1, task="one")
    high = GenerationRequest([3], 5, task="two")
    with generating(decoder, budget=8, chunk=4) as (generator, _):
        order: list[str] = []
        first = generator.submit(low, lambda _: order.append("low"))
        assert held.reached.wait(SECONDS)
        second = generator.submit(high, lambda _: order.append("high"))
        held.go_on.set()
        assert second.result(SECONDS).tokens == alone(high)
        assert first.result(SECONDS).tokens == alone(low)
        assert order == ["low"] * 2 + ["high"] * 5 + ["low"] * 18
        assert generator.stats().preempted == 1


@pytest.mark.parametrize("length", [17, 31, 32, 33])
def test_an_equal_prompt_computes_one_token_at_least(length: int) -> None:
    request = GenerationRequest([1] * length, 2)
    with generating(FakeDecoder(1), prefix_bytes=10**6) as (generator, _):
        for computed in (length, length - (length - 1) // 16 * 16):
            before = generator.stats().prefilled_tokens
            assert generator.submit(request).result(SECONDS).tokens == alone(request)
            assert generator.stats().prefilled_tokens - before == computed


def test_an_equal_prompt_computes_its_last_block_alone() -> None:
    decoder = FakeDecoder(2)
    request = GenerationRequest(list(range(33)), 2, tenant="x", task="one")
    with generating(decoder, budget=64, chunk=64, prefix_bytes=10**6) as (generator, _):
        owner = GenerationRequest(request.prompt, 2, tenant="y", task="one")
        version = GenerationRequest(request.prompt, 2, tenant="x", task="two")
        for other, computed in ((request, 33), (request, 1), (owner, 33), (version, 33)):
            before = generator.stats().prefilled_tokens
            assert generator.submit(other).result(SECONDS).tokens == alone(other)
            assert generator.stats().prefilled_tokens - before == computed
        assert generator.stats().reused_tokens == 32
        assert generator.stats().cached_prefix_bytes == 3 * 2 * 160


def test_prompts_of_one_length_that_wait_together_are_computed_together() -> None:
    held = Held("prefill")
    decoder = FakeDecoder(4, before=held)
    requests = [GenerationRequest([1] * length, 3, task=str(length)) for length in (2, 3, 3, 4)]
    with generating(decoder) as (generator, _):
        handles = [generator.submit(requests[0])]
        assert held.reached.wait(SECONDS)
        handles += [generator.submit(request) for request in requests[1:]]
        held.go_on.set()
        for request, handle in zip(requests, handles, strict=True):
            assert handle.result(SECONDS).tokens == alone(request)
        assert decoder.calls["prefill"] == 3
        assert generator.stats().prefilled_tokens == 12


@pytest.mark.parametrize("scored", [False, True])
def test_log_probabilities_are_computed_where_one_sequence_wants_them(scored: bool) -> None:
    held = Held("prefill")
    requests = [GenerationRequest([1, 2], 3, scored=own) for own in (False, scored)]
    with generating(FakeDecoder(2, before=held)) as (generator, _):
        handles = [generator.submit(request) for request in requests]
        held.go_on.set()
        tokens = [handle.result(SECONDS).tokens for handle in handles]
    assert [[token.id for token in own] for own in tokens] == [[token.id for token in alone(requests[0])]] * 2
    assert [math.isnan(token.logprob) for token in tokens[1]] == [not scored] * 3


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_cancelling_is_at_once_in_every_phase(phase: str) -> None:
    held = Held("prefill" if phase == "waiting" else phase)
    decoder = FakeDecoder(1, before=held)
    with generating(decoder, budget=4, chunk=2) as (generator, versions):
        running = generator.submit(GenerationRequest([1, 2, 3], 30))
        waiting = generator.submit(GenerationRequest([4], 3))
        assert held.reached.wait(SECONDS)
        handle = waiting if phase == "waiting" else running
        assert handle.cancel()
        assert handle.future.cancelled()
        assert not handle.cancel()
        # The version stays while a run may use it.
        assert [each.releases for each in versions.all] == [0, 0]
        held.go_on.set()
        other = running if phase == "waiting" else waiting
        assert len(ids(other)) == (30 if other is running else 3)
        assert generator.stats().cancelled == 1
        with pytest.raises(CancelledError):
            handle.result()


FAILURES = [("prefill", 1), ("decode", 3), ("move", 1), ("restore", 1)]


@pytest.mark.parametrize(("name", "failed"), FAILURES, ids=[name for name, _ in FAILURES])
def test_an_error_fails_the_sequences_of_that_run_alone(name: str, failed: int) -> None:
    left, all_there = threading.Event(), threading.Event()

    def fail(called: str, _slots: Sequence[int]) -> None:
        assert all_there.wait(SECONDS)
        if called == name and left.is_set():
            left.clear()
            raise MemoryError("the device is full")

    decoder = FakeDecoder(3, before=fail)
    decoder.dense = name != "move"
    # The first ends before the third, which moves then.
    requests = [GenerationRequest([*range(20), index], [4, 12, 9][index], public=True) for index in range(3)]
    with generating(decoder, budget=90, chunk=90, prefix_bytes=10**6) as (generator, _):
        handles = [generator.submit(request) for request in requests]
        if name in {"decode", "move"}:
            left.set()
        all_there.set()
        errors = [handle.future.exception(SECONDS) for handle in handles]
        if name in {"prefill", "restore"}:
            left.set()
            errors = [generator.submit(requests[0]).future.exception(SECONDS)]
        assert any(isinstance(error, MemoryError) for error in errors)
        assert sum(error is not None for error in errors) <= failed
        for request, handle in zip(requests, handles, strict=True):
            if handle.future.exception() is None:
                assert handle.result().tokens == alone(request)
        again = generator.submit(requests[1])
        assert again.result(SECONDS).tokens == alone(requests[1])
        assert generator.stats().failed == sum(error is not None for error in errors)


def test_blocks_that_cannot_be_saved_harm_nothing() -> None:
    def fail(called: str, _slots: Sequence[int]) -> None:
        if called == "save":
            raise MemoryError

    request = GenerationRequest(list(range(20)), 5)
    with generating(FakeDecoder(1, before=fail), prefix_bytes=10**6) as (generator, _):
        assert generator.submit(request).result(SECONDS).tokens == alone(request)
        assert generator.stats().cached_prefix_bytes == 0


def test_logits_that_are_not_finite_fail_their_row_alone() -> None:
    class Broken(FakeDecoder):
        def decode(self, *arguments: Any) -> Any:
            logits = super().decode(*arguments)
            if len(logits) == 2:
                logits[0] = np.nan
            return logits

    held = Held("prefill")
    requests = [GenerationRequest([1], 5), GenerationRequest([2], 5)]
    with generating(Broken(2, before=held)) as (generator, _):
        handles = [generator.submit(request) for request in requests]
        held.go_on.set()
        assert isinstance(handles[0].future.exception(SECONDS), RunError)
        assert handles[1].result(SECONDS).tokens == alone(requests[1])


def test_a_deadline_ends_a_running_and_a_waiting_sequence() -> None:
    now = [0.0]

    def tick(called: str, _slots: Sequence[int]) -> None:
        now[0] += called == "decode"

    with generating(FakeDecoder(1, before=tick), clock=lambda: now[0]) as (generator, _):
        running = generator.submit(GenerationRequest([5], 60, deadline=10))
        waiting = generator.submit(GenerationRequest([5], 60, deadline=5))
        fine = generator.submit(GenerationRequest([5], 3))
        for handle in (running, waiting):
            with pytest.raises(DeadlineExceeded):
                handle.result(SECONDS)
        assert len(running.tokens) == 11
        assert not waiting.tokens
        assert len(ids(fine)) == 3
        assert generator.stats().overdue == 2


def test_closing_fails_what_runs_and_waits() -> None:
    held = Held("decode")
    with generating(FakeDecoder(1, before=held)) as (generator, versions):
        handles = [generator.submit(GenerationRequest([5], 20)) for _ in range(3)]
        assert held.reached.wait(SECONDS)
        closing = threading.Thread(target=generator.close)
        closing.start()
        for handle in handles:
            assert isinstance(handle.future.exception(SECONDS), RunError)
        assert closing.is_alive()  # until the run has ended
        held.go_on.set()
        closing.join(SECONDS)
        assert versions.released_once()
        with pytest.raises(RunError, match="closed"):
            generator.submit(GenerationRequest([5]))


def test_a_full_queue_refuses_and_releases() -> None:
    held = Held("prefill")
    with generating(FakeDecoder(1, before=held), max_waiting=1) as (generator, versions):
        handles = [generator.submit(GenerationRequest([5], 2))]
        assert held.reached.wait(SECONDS)
        handles.append(generator.submit(GenerationRequest([6], 2)))
        with pytest.raises(QueueFull):
            generator.submit(GenerationRequest([7], 2))
        assert [each.releases for each in versions.all] == [0, 0, 1]
        with pytest.raises(QueueFull):
            generator.submit_choices(GenerationRequest([7], 2, Sampling(n=2)))
        held.go_on.set()
        assert [len(ids(handle)) for handle in handles] == [2, 2]


def test_choices_of_a_prompt_differ_and_can_be_had_again() -> None:
    request = GenerationRequest([5, 6], 8, Sampling(temperature=1, seed=3, n=3))
    with generating(FakeDecoder(2)) as (generator, _):
        found = [handle.result(SECONDS).tokens for handle in generator.submit_choices(request)]
    assert found == [alone(request, choice) for choice in range(3)]
    assert len({tuple(token.id for token in tokens) for tokens in found}) == 3


def test_a_stop_string_ends_a_sequence_and_no_part_of_it_is_given_out() -> None:
    plain = GenerationRequest([5], 20, text=Letters)
    letters = "".join(chr(ord("a") + token.id % 26) for token in alone(plain))
    stop = letters[6:9]
    assert letters.index(stop) == 6
    with generating(FakeDecoder(2)) as (generator, _):
        whole = generator.submit(plain).result(SECONDS)
        cut = generator.submit(GenerationRequest([5], 20, Sampling(stop_strings=["??", stop]), text=Letters))
        assert (whole.text, whole.reason) == (letters, "length")
        assert (cut.result(SECONDS).text, cut.result().reason) == (letters[:6], "stop")
        assert len(cut.tokens) < 20


def test_a_stop_token_has_no_text() -> None:
    last = alone(GenerationRequest([5], 4))[-1].id
    request = GenerationRequest([5], 9, Sampling(stop_tokens=[last]), text=Letters)
    with generating(FakeDecoder(1)) as (generator, _):
        result = generator.submit(request).result(SECONDS)
    assert result.tokens[-1].id == last
    assert len(result.text) == len(result.tokens) - 1


def test_a_sequence_may_fill_its_slot() -> None:
    request = GenerationRequest([1] * 100, 29)
    with generating(FakeDecoder(1)) as (generator, _):
        assert generator.submit(request).result(SECONDS).tokens == alone(request)


def test_a_version_that_cannot_be_acquired_leaves_nothing_behind() -> None:
    class Refusing(FakeVersions):
        def acquire(self, task: Hashable) -> FakeHeld:
            raise RunError("acquire", problem="no room")

    generator = Generator(FakeDecoder(1), Refusing())
    with pytest.raises(RunError, match="no room"):
        generator.submit(GenerationRequest([1]))
    assert generator.stats().waiting == 0
    generator.close()


def test_usage_is_counted() -> None:
    now = [0.0]

    def tick(_called: str, _slots: Sequence[int]) -> None:
        now[0] += 0.5

    with generating(FakeDecoder(2, before=tick), clock=lambda: now[0]) as (generator, _):
        ids(generator.submit(GenerationRequest([1, 2, 3], 4)))
        generator.close()
        figures = generator.stats()
    assert (figures.slots, figures.steps, figures.prefilled_tokens, figures.generated_tokens) == (2, 4, 3, 4)
    assert figures.busy_seconds == 2
    assert figures.tokens_per_second == 2


def test_a_prompt_of_a_tenant_below_its_share_is_computed_after_the_run_that_it_finds() -> None:
    calls = list[tuple[str, int]]()
    held = Held("prefill")
    decoder = FakeDecoder(3, before=held)
    own = decoder.prefill

    def prefill(
        slots: Sequence[int], tokens: Array, past: int, versions: Sequence[Any], features: Sequence[object] = ()
    ) -> Array:
        calls.append((str(tokens[0][0]), tokens.shape[1]))
        return own(slots, tokens, past, versions, features)

    decoder.prefill = prefill  # type: ignore[method-assign]
    with generating(decoder, budget=64, chunk=8, order=Fair[None](lambda _: 1.0)) as (generator, _):
        flood = [generator.submit(GenerationRequest([1] * 90, 3, tenant="flood")) for _ in range(4)]
        assert held.reached.wait(SECONDS)
        late = generator.submit(GenerationRequest([2] * 6, 3, tenant="late"))
        held.go_on.set()
        assert late.result(SECONDS).tokens == alone(GenerationRequest([2] * 6, 3))
        for handle in flood:
            assert handle.result(SECONDS).tokens == alone(GenerationRequest([1] * 90, 3))
    assert calls[:2] == [("1", 8), ("2", 6)]

"""The thread that generates: it asks the scheduler, drives the decoder, samples, and hands out tokens."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, abc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from tpeft_deploy.errors import DeadlineExceeded, RunError
from tpeft_deploy.runtime.generation.decoder import Decoder
from tpeft_deploy.runtime.generation.handle import Generated, GenerationRequest, Handle
from tpeft_deploy.runtime.generation.orders import SequenceOrder
from tpeft_deploy.runtime.generation.prefixes import Match, PrefixCache, Sized
from tpeft_deploy.runtime.generation.record import Record
from tpeft_deploy.runtime.generation.sampling import Token
from tpeft_deploy.runtime.generation.scheduler import Scheduler
from tpeft_deploy.runtime.generation.sequence import (
    HeldVersion,
    Piece,
    Reason,
    Sequence,
    Step,
    Versions,
    release_all,
)
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.generation.top_logits.device_logits import DeviceLogits, choices
from tpeft_deploy.tucker import Array

__all__ = ["Generator"]

_log = logging.getLogger("tpeft_deploy.runtime")

# A thread that has had nothing to do for so many seconds ends, so that a generator nobody closed can be collected.
_IDLE_SECONDS = 5.0


class Generator:
    """Runs sequences of any number of callers together, on one thread that starts with the first.

    The tokens of a sequence do not depend on what else runs, on the limits, or on being preempted.

    Args:
        decoder: device.
        versions: adapter versions; one is acquired for each sequence, and released when the sequence is over.
        budget: tokens that one step computes at most, at least the number of slots.
        chunk: tokens of a prompt in one run.
        doubling: number of tokens behind which one costs twice as much as a first one, as for `Scheduler`.
        max_waiting: sequences that may wait for slots.
        order: order of those that wait, with the weights of tenants; by priority, then first come, by default, with all
            tenants as one.
        prefix_bytes: bound of the memory for caches of known prefixes; 0 keeps none.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        decoder: Decoder,
        versions: Versions,
        *,
        budget: int = 512,
        chunk: int = 256,
        doubling: int | None = None,
        max_waiting: int = 1024,
        order: SequenceOrder | None = None,
        prefix_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decoder = decoder
        self._versions = versions
        self._clock = clock
        self._prefixes: PrefixCache[Sized] | None = PrefixCache(prefix_bytes) if prefix_bytes else None
        self._forgotten: list[Hashable] = []  # keys of versions, the prefixes of which are to be dropped
        self._matches: dict[int, Match[Sized]] = {}  # of sequences admitted in this step, by their ids
        self._scheduler = Scheduler(
            decoder.slots,
            budget=budget,
            chunk=chunk,
            doubling=doubling,
            max_waiting=max_waiting,
            order=order,
            weight=None if order is None else order.weight,
            reuse=self._reuse,
        )
        # Guards everything below and the scheduler; never held while the decoder or a caller's code runs.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._ids = itertools.count()
        self._records: dict[int, Record] = {}
        self._stepping = False
        self._leaving: list[HeldVersion] = []  # versions to release once the step has ended that may use them
        self._worker: threading.Thread | None = None
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._busy = 0.0

    def submit(
        self,
        request: GenerationRequest,
        on_token: Callable[[Token], None] | None = None,
        *,
        choice: int = 0,
        version: HeldVersion | None = None,
    ) -> Handle:
        """Let a sequence wait for a slot.

        Args:
            request: prompt and how to continue it.
            on_token: called with each token, on the generator's thread.
            choice: index among the `n` sequences of the prompt, that differ in their random numbers.
            version: version of the task, acquired already for a request that was checked.

        Raises:
            InputError: the decoder cannot run it.
            QueueFull: too many sequences wait already.
            RunError: the generator is closed.
            TpeftError: as raised by acquiring the version, or by the order.
        """
        if version is None:
            self.check(request)
            version = self._versions.acquire(request.task)
        try:
            cancel = partial(self._end, reason="cancelled")
            record = Record.of(request, next(self._ids), version, choice, cancel, on_token)
            self._enter(record)
        except BaseException:
            version.release()
            raise
        return record.handle

    def check(self, request: GenerationRequest) -> None:
        """Refuse what the decoder cannot run.

        Raises:
            InputError: the prompt or a number does not fit.
        """
        request.check(self._decoder.vocabulary, self._decoder.length)

    def forget(self, key: Hashable) -> None:
        """Drop the known prefixes of an adapter version, before the next step."""
        with self._lock:
            self._forgotten.append(key)
            self._changed.notify()
            if self._worker is None:
                self._drop_forgotten()

    def submit_choices(self, request: GenerationRequest) -> list[Handle]:
        """Let all `n` sequences of a prompt wait, or none; raises what `submit` does."""
        handles: list[Handle] = []
        try:
            for choice in range(request.sampling.n):
                handles.append(self.submit(request, choice=choice))  # noqa: PERF401  (kept for the handler below)
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def stats(self) -> GenerationStats:
        """What runs, and what has been done so far."""
        with self._lock:
            names = ("steps", "prefilled_tokens", "reused_tokens", "generated_tokens")
            ends = ("finished", "cancelled", "overdue", "failed")
            return GenerationStats(
                waiting=self._scheduler.waiting,
                running=len(self._scheduler.running),
                slots=self._scheduler.slots,
                cached_prefix_bytes=0 if self._prefixes is None else self._prefixes.bytes,
                preempted=self._scheduler.preempted,
                running_tasks=Counter(each.lane for each in self._scheduler.running),
                waiting_tasks=Counter(each.lane for each in self._scheduler.queue()),
                busy_seconds=self._busy,
                **{name: self._counts[name] for name in (*names, *ends)},
            )

    def close(self) -> None:
        """Refuse new sequences, fail all others, and return once the step that runs has ended."""
        with self._lock:
            self._closed = True
            self._changed.notify()
            worker, records = self._worker, list(self._records.values())
        self._fail(records, _closed())
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def _enter(self, record: Record) -> None:
        with self._lock:
            if self._closed:
                raise _closed()
            self._scheduler.add(record.sequence)
            self._records[record.sequence.id] = record
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="generator", daemon=True)
                self._worker.start()
            self._changed.notify()

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            _log.exception("the thread that generates has failed")
            with self._lock:
                self._closed, self._worker = True, None
                records = list(self._records.values())
            self._fail(records, error)

    def _turn(self) -> bool:
        """Wait for a step and run it; False when the thread has to end.  A function so that it keeps nothing."""
        with self._lock:
            while True:
                self._drop_forgotten()
                overdue = self._scheduler.expire(self._clock())
                step = Step() if self._closed else self._scheduler.step()
                if overdue or step:
                    break
                if self._closed or (not self._changed.wait(_IDLE_SECONDS) and not self._records):
                    self._worker = None
                    return False
            self._stepping = True
            began = self._clock()
            ended = [self._leave(sequence, "overdue") for sequence in overdue]
        try:
            for record in ended:
                error = DeadlineExceeded(
                    "generate tokens", got=f"{len(record.handle.tokens)} tokens before its deadline"
                )
                record.handle.resolve(error)
            self._run(step)
        finally:
            with self._lock:
                self._stepping = False
                self._counts["steps"] += bool(step)
                self._busy += self._clock() - began
                leaving, self._leaving = self._leaving, []
            release_all(leaving)
        return True

    def _run(self, step: Step) -> None:
        for move in step.moves:
            with self._failing([move.sequence]):
                self._decoder.move(move.source, move.target, move.length)
        for sequence in step.admitted:
            if (slot := sequence.slot) is not None:  # else over by now
                with self._failing([sequence]):
                    self._decoder.enter(slot, sequence)
            self._restore(sequence)
        # Rows that were cancelled just now stay, so that the slots are dense; one that could not be moved has no cache.
        decodes = [piece for piece in step.decodes if piece.sequence.reason != "error"]
        if decodes:
            self._compute(decodes)
        for pieces in step.prefills():
            with self._lock:
                if self._scheduler.overtaken(pieces[0].sequence):
                    break  # the next step computes what is left of this one
            self._compute(pieces, prefill=True)

    def _compute(self, pieces: abc.Sequence[Piece], *, prefill: bool = False) -> None:
        """Compute pieces of one length together."""
        with self._failing([piece.sequence for piece in pieces]):
            tokens = np.array([piece.sequence.span(piece.past, piece.past + piece.length) for piece in pieces])
            slots, versions = [piece.slot for piece in pieces], [piece.sequence.version for piece in pieces]
            if prefill:
                features = [piece.sequence.features for piece in pieces]
                logits = self._decoder.prefill(slots, tokens, pieces[0].past, versions, features)
                self._counts["prefilled_tokens"] += tokens.size
            else:
                pasts = np.array([piece.past for piece in pieces])
                logits = self._decoder.decode(slots, tokens[:, 0], pasts, versions)
            self._computed(pieces, logits)

    def _computed(self, pieces: abc.Sequence[Piece], logits: Array | DeviceLogits) -> None:
        """Take in the result of a run: the caches have grown, and the logits give the next tokens."""
        with self._lock:
            for piece in pieces:
                self._scheduler.computed(piece.sequence, piece.length)
            records = [self._records.get(piece.sequence.id) for piece in pieces]
        taken = zip(pieces, records, strict=True)
        samplers = [record.sampler if record is not None and piece.last else None for piece, record in taken]
        found = choices(logits, samplers, any(record.scored for record in records if record is not None))
        for piece, record, choose in zip(pieces, records, found, strict=True):
            if record is None or choose is None:
                continue
            try:
                if record.sequence.phase == "prefilling":
                    self._keep(record, piece.slot, record.sequence.cached)
                self._advance(record, piece, choose())
            except Exception as error:
                self._fail([record], error)

    def _advance(self, record: Record, piece: Piece, token: Token) -> None:
        sequence = record.sequence
        with self._lock:
            self._scheduler.append(sequence, token.id)
            self._counts["generated_tokens"] += 1
        token, reason = record.with_text(token, sequence.ending())
        if reason is not None and not sequence.over:
            self._keep(record, piece.slot, piece.past + piece.length)
        record.handle.publish(token)
        if reason is not None and self._end(sequence, reason):
            record.handle.resolve(Generated(record.handle.tokens, reason))

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            key = self._forgotten.pop()
            if self._prefixes is not None:
                self._prefixes.drop(key)

    def _reuse(self, sequence: Sequence) -> int:
        """Tokens of a sequence of which the cache is known; the scheduler asks when it admits it."""
        if self._prefixes is None:
            return 0
        owner, known = self._records[sequence.id].owner, sequence.known(len(sequence) - 1)
        match = self._prefixes.match(sequence.version.key, owner, known, inputs=sequence.digest)
        self._matches[sequence.id] = match
        return match.tokens

    def _restore(self, sequence: Sequence) -> None:
        """Fill the slot of an admitted sequence with the blocks that are known."""
        match, slot = self._matches.pop(sequence.id, None), sequence.slot
        if match is None or self._prefixes is None:
            return
        if slot is not None:
            with self._failing([sequence]):
                for index, block in enumerate(match.blocks):
                    self._decoder.restore(slot, index * self._prefixes.block_tokens, block)
            self._counts["reused_tokens"] += match.tokens
        self._prefixes.release(match)

    def _keep(self, record: Record, slot: int, length: int) -> None:
        """Save the blocks of a sequence's first tokens for those that begin alike; an error saves none."""
        if self._prefixes is None:
            return
        sequence = record.sequence
        try:
            self._prefixes.insert(
                sequence.version.key,
                record.owner,
                sequence.known(length),
                lambda start, number: self._decoder.save(slot, start, number),
                inputs=sequence.digest,
            )
        except Exception:
            _log.exception("a block of a prefix could not be saved")

    def _end(self, sequence: Sequence, reason: Reason) -> bool:
        """End a sequence, and release its version when no step uses it; False if it was over."""
        with self._lock:
            if not self._scheduler.finish(sequence, reason):
                return False
            names = {"cancelled": "cancelled", "deadline": "overdue", "error": "failed"}
            self._leave(sequence, names.get(reason, "finished"))
            released = [] if self._stepping else self._leaving
            if not self._stepping:
                self._leaving = []
        release_all(released)
        return True

    def _leave(self, sequence: Sequence, why: str) -> Record:
        self._counts[why] += 1
        self._leaving.append(sequence.version)
        return self._records.pop(sequence.id)

    @contextmanager
    def _failing(self, touched: abc.Sequence[Sequence]) -> Iterator[None]:
        """Fail the given sequences, and no others, if the block raises."""
        try:
            yield
        except Exception as error:
            _log.debug("a run of %d sequences failed", len(touched), exc_info=True)
            self._fail([self._records[each.id] for each in touched if each.id in self._records], error)

    def _fail(self, records: abc.Sequence[Record], error: BaseException) -> None:
        for record in records:
            if self._end(record.sequence, "error"):
                record.handle.resolve(error)


def _closed() -> RunError:
    return RunError("generate tokens", problem="the runtime is closed", fix="Open the bundle again.")

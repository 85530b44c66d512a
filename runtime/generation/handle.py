"""What callers of a generator give and get: a request, and a handle with its tokens as they come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.generation.sampling import Constraint, Sampling, Token
from tpeft_deploy.runtime.generation.sequence import Reason

__all__ = ["Detokeniser", "Generated", "GenerationRequest", "Handle"]

_log = logging.getLogger("tpeft_deploy.runtime")


class Detokeniser(Protocol):
    """Text of one sequence, token by token."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is settled with it."""

    def flush(self) -> str:
        """Return the rest of the text."""


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to continue it.

    Attributes:
        prompt: tokens, at least one; none for the first token of an encoder-decoder.
        max_new_tokens: tokens to generate at most.
        sampling: choice of the tokens.
        task: task of the adapter; None for the base.
        tenant: tenant that the order charges, and that may reuse the caches of its prompts.
        public: whether all tenants may reuse the caches of its prompt.
        priority: smaller values first.
        deadline: time by the generator's clock after which the result is of no use.
        text: makes the detokeniser of each sequence; needed for stop strings.
        scored: whether the log-probabilities of the tokens are wanted; without, they are NaN.
        marks: tokens as known prefixes compare them, where the tokens do not tell inputs apart.
        inputs: inputs of the component that computes what the decoder reads beside tokens, as for `Runtime.generate`.
        constraint: makes the constraint of each sequence.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    task: Hashable = None
    tenant: str = ""
    public: bool = False
    priority: int = 0
    deadline: float = math.inf
    text: Callable[[], Detokeniser] | None = None
    scored: bool = True
    marks: tuple[Hashable, ...] = ()
    inputs: Mapping[str, object] | None = field(default=None, compare=False)  # arrays have no equality
    constraint: Callable[[], Constraint] | None = None

    def check(self, vocabulary: int, length: int) -> None:
        """Refuse what a decoder cannot run.

        Args:
            vocabulary: number of tokens that the decoder knows.
            length: tokens that a slot of the decoder holds.

        Raises:
            InputError: the prompt or a number does not fit.
        """
        doing = "generate tokens"
        prompt = np.asarray(self.prompt)
        if not prompt.size or prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            got = f"{prompt.dtype} of shape {list(prompt.shape)}"
            raise InputError(doing, expected="a prompt that is a list of at least one token", got=got)
        wrong = prompt[(prompt < 0) | (prompt >= vocabulary)]
        if wrong.size:
            raise InputError(doing, expected=f"tokens from 0 to {vocabulary - 1}", got=wrong[0])
        most: object = self.max_new_tokens  # of any type, as callers need not check theirs
        if not isinstance(most, int) or most < 1:
            raise InputError(doing, expected="max_new_tokens of at least 1", got=repr(most))
        if len(self.prompt) + self.max_new_tokens - 1 > length:
            raise InputError(
                doing,
                expected=f"at most {length + 1} tokens in all",
                got=f"a prompt of {len(self.prompt)} and max_new_tokens of {self.max_new_tokens}",
                fix="Shorten the prompt, or ask for fewer tokens.",
            )
        if self.sampling.stop_strings and self.text is None:
            raise InputError(doing, problem="stop strings need text, and the model has no tokenizer", fix="Use tokens.")
        self.sampling.check(vocabulary)


@dataclass(frozen=True)
class Generated:
    """Result of one sequence.

    Attributes:
        tokens: generated tokens; the last may be a stop token.
        reason: "stop" for a stop token or string, "length" for the number of tokens.
    """

    tokens: list[Token]
    reason: Reason

    @property
    def text(self) -> str:
        """Text of the tokens; empty without a detokeniser."""
        return "".join(token.text for token in self.tokens)


class Handle:
    """One sequence that a generator runs.

    Iterate over it asynchronously for the tokens as they come, in any number of event loops; every iteration begins
    with the first token.  An iteration that is left early does not cancel the sequence.

    Args:
        cancel: ends the sequence; called once `future` is cancelled.
        on_token: called with each token, on the generator's thread; must be quick.

    Attributes:
        future: result; cancelling it, or a task that awaits it, cancels the sequence.
        tokens: tokens so far.
        times: when each came, in seconds of `time.monotonic`.
    """

    def __init__(self, cancel: Callable[[], object], on_token: Callable[[Token], None] | None = None) -> None:
        self.future: Future[Generated] = Future()
        self.tokens: list[Token] = []
        self.times: list[float] = []
        self._on_token = on_token
        self._lock = threading.Lock()
        self._wakes: list[Callable[[], None]] = []  # of iterations
        self.future.add_done_callback(lambda future: self._done(cancel if future.cancelled() else None))

    def cancel(self) -> bool:
        """End the sequence at once; False if it is over already."""
        return not self.future.done() and self.future.cancel()

    def result(self, timeout: float | None = None) -> Generated:
        """Wait for the result."""
        return self.future.result(timeout)

    def publish(self, token: Token) -> None:
        """Hand out a token; an error of the callback is logged, and harms nothing."""
        if self.future.done():
            return
        self.times.append(time.monotonic())
        self.tokens.append(token)
        if self._on_token is not None:
            try:
                self._on_token(token)
            except Exception:
                _log.exception("a callback for generated tokens failed")
        self._wake()

    def resolve(self, result: Generated | BaseException) -> None:
        """Hand out the result, unless the caller has cancelled."""
        with contextlib.suppress(InvalidStateError):  # cancelled just now
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)

    async def __aiter__(self) -> AsyncGenerator[Token]:
        """Iterate over the tokens.

        Raises:
            asyncio.CancelledError: the sequence was cancelled.
            TpeftError: the sequence failed.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._wakes.append(wake)
        try:
            given, over = 0, False
            while not over:
                changed.clear()
                over = self.future.done()
                for token in self.tokens[given:]:
                    given += 1
                    yield token
                if not over:
                    await changed.wait()
            try:
                self.future.result()
            except CancelledError:
                raise asyncio.CancelledError from None
        finally:
            with self._lock:
                self._wakes.remove(wake)

    def _done(self, cancel: Callable[[], object] | None) -> None:
        if cancel is not None:
            cancel()
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            wakes = list(self._wakes)
        for wake in wakes:
            wake()

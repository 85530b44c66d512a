"""A sequence with everything that its tokens pass through on the way to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tpeft_deploy.runtime.generation.handle import Detokeniser, GenerationRequest, Handle
from tpeft_deploy.runtime.generation.sampling import Sampler, Token
from tpeft_deploy.runtime.generation.sequence import HeldVersion, Reason, Sequence
from tpeft_deploy.runtime.generation.sources.source import digest
from tpeft_deploy.runtime.generation.stop_strings import StopStrings

__all__ = ["Record"]


@dataclass(eq=False)
class Record:
    """A sequence of a generator.

    Attributes:
        sequence: state of the sequence.
        handle: way back to the caller.
        sampler: choice of its tokens.
        owner: tenant that may reuse its cache; None for all.
        text: detokeniser, if the caller wants text.
        stops: stop strings.
        scored: whether the log-probabilities of its tokens are wanted.
    """

    sequence: Sequence
    handle: Handle
    sampler: Sampler
    owner: str | None
    text: Detokeniser | None
    stops: StopStrings
    scored: bool

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        id: int,
        version: HeldVersion,
        choice: int,
        end: Callable[[Sequence], object],
        on_token: Callable[[Token], None] | None,
    ) -> Record:
        """Make the record of a request.

        Args:
            request: request, checked.
            id: unique number.
            version: adapter version, acquired.
            choice: index among the `n` sequences of the prompt.
            end: called when the caller cancels.
            on_token: called with each token.
        """
        sequence = Sequence(
            id,
            tuple(int(token) for token in request.prompt),
            request.max_new_tokens,
            version,
            tenant=request.tenant,
            lane=request.task,
            priority=request.priority,
            deadline=request.deadline,
            stop_tokens=frozenset(request.sampling.stop_tokens),
            inputs=request.inputs,
            digest=None if request.marks else digest(request.inputs),
            marks=request.marks,
        )
        return cls(
            sequence,
            Handle(lambda: end(sequence), on_token),
            Sampler(request.sampling, sequence.prompt, choice, request.constraint and request.constraint()),
            None if request.public else request.tenant,
            None if request.text is None else request.text(),
            StopStrings(request.sampling.stop_strings),
            request.scored,
        )

    def with_text(self, token: Token, reason: Reason | None) -> tuple[Token, Reason | None]:
        """A token with the text that is settled with it, and why the sequence ends; a stop token has no text."""
        if self.text is None:
            return token, reason
        text = "" if reason == "stop" else self.stops.push(self.text.push(token.id))
        if reason is not None:
            text += self.stops.push(self.text.flush()) + self.stops.flush()
        return replace(token, text=text), "stop" if self.stops.found is not None else reason

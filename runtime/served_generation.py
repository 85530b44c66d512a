"""Generation of token sequences on the tasks of a runtime."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from functools import partial

from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.task_versions import Task, TaskVersions
from tpeft_deploy.runtime.component import ServedComponent
from tpeft_deploy.runtime.generation.handle import Detokeniser, GenerationRequest, Handle
from tpeft_deploy.runtime.generation.orders import SequenceOrder
from tpeft_deploy.runtime.generation.sampling import Sampling, Token
from tpeft_deploy.runtime.generation.service import GenerationService
from tpeft_deploy.runtime.generation.stats import GenerationStats

__all__ = ["ServedGeneration"]


class ServedGeneration:
    """Base class of `Runtime`: generation, where the bundle has a decoder."""

    _generation: GenerationService
    _first_loader: AdapterLoader  # that of the first device
    _parts: Collection[ServedComponent]
    _versions: TaskVersions

    def generate(
        self,
        prompts: Sequence[Sequence[int]] = (),
        task: Task | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        inputs: Sequence[Mapping[str, object] | None] | None = None,
        max_new_tokens: int = 64,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
    ) -> list[list[int]]:
        """Continue prompts, together with those of other callers and on any mixture of tasks.

        Args:
            prompts: lists of tokens; for an encoder-decoder the decoder's, with an empty list, or none at all beside
                `inputs`, for the first token that the model begins with.
            task: one task for all prompts, or a weighted set of tasks; the base when neither is given.
            tasks: one task (or set) per prompt.
            inputs: for each prompt the inputs of the encoder, without the batch axis and without padding:
                {"input_ids": [tokens]} or {"input_features": [mels, frames]}.
            max_new_tokens: tokens to generate at most, for each prompt.
            stop: tokens that end a sequence, beside those of `sampling`; the one that does is part of it.
            sampling: choice of the tokens; the most probable ones by default.
            timeout: seconds after which the result is of no use.
            tenant: tenant that is charged, and that may reuse the caches of its prompts.
            priority: the smaller first.

        Returns:
            The new tokens of each prompt.

        Raises:
            InputError: the bundle has no decoder, or a prompt, input or number does not fit; nothing has run.
            UnknownTask, CompositionError, AdapterError, BundleError, CapacityError: as `run`.
            QueueFull: too many sequences of other callers wait.
            DeadlineExceeded: the time was over first.
        """
        prompts, given = GenerationService.prompts(prompts, inputs)
        own = GenerationService.tasks(prompts, task, tasks)
        like = GenerationService.request(max_new_tokens, stop, sampling, timeout, tenant, priority)
        return self._generation.generate(prompts, own, given, like)

    async def stream(
        self,
        prompt: Sequence[int] = (),
        task: Task | None = None,
        *,
        inputs: Mapping[str, object] | None = None,
        max_new_tokens: int = 64,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        text: Callable[[], Detokeniser] | None = None,
    ) -> AsyncGenerator[Token]:
        """Continue a prompt and give each token as soon as it is there; closing the iterator ends the sequence.

        Args:
            prompt: tokens, as for `generate`.
            task: a task, or a weighted set of tasks.
            inputs: inputs of the encoder for this prompt, as for `generate`.
            max_new_tokens, stop, sampling, timeout, tenant, priority: as for `generate`.
            text: makes a detokeniser, for the text of the tokens and for stop strings.

        Raises:
            TpeftError: as `generate`, when the first token is asked for.
        """
        like = GenerationService.request(max_new_tokens, stop, sampling, timeout, tenant, priority, text)
        handle = await self._generation.start_one(prompt, task, inputs, like)
        try:
            async with aclosing(aiter(handle)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            handle.cancel()

    async def start(self, request: GenerationRequest, task: Task | None = None) -> list[Handle]:
        """Begin the `n` sequences of a request, for callers that need more than `stream` gives; raises as it does.

        Args:
            request: request; its task is a name, or None for the base.
            task: task, or weighted set of tasks, in the place of the request's.
        """
        return await self._generation.start(request, task)

    def open_generation(self) -> None:
        """Make the decoder and its caches now, which the first sequence would wait for; raises as `generate` does."""
        self._generation.open()

    @property
    def most_tokens(self) -> int:
        """Tokens of a sequence at most, those of its prompt included; 0 for a bundle without a decoder."""
        return self._generation.most_tokens

    def generation(self) -> GenerationStats | None:
        """What `generate` and `stream` do and have done; None before the first sequence."""
        return self._generation.stats()

    def _open_generation(
        self,
        residency: Residency,
        device: str,
        kv_bytes: int | None,
        max_tokens: int | None,
        max_source: int | None,
        prefix_bytes: int,
        order: SequenceOrder | None,
    ) -> GenerationService:
        """Generation on the component that has a decoder; on the last, which refuses it, where none has."""
        parts = list(self._parts)
        decoding = next((own for own in parts if own.manifest.decoder is not None), parts[-1])
        ports = decoding.manifest.decoder
        source = next((own for own in parts if ports is not None and own.name and own.name == ports.source), None)
        return GenerationService(
            decoding.manifest,
            decoding.session,
            residency,
            self._first_loader,
            self._versions,
            device,
            kv_bytes=kv_bytes,
            max_tokens=max_tokens,
            max_source=max_source,
            prefix_bytes=prefix_bytes,
            order=order,
            component=decoding.name,
            open_rows=decoding.open_rows,
            open_choice=decoding.open_choice,
            source=None if source is None else (source.manifest, partial(source.engine.run_one, held=True)),
        )

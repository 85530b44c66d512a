"""Generation: resolve the target, spend quota, start sequences, and end them with their request."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.errors import (
    InputError,
    MissingExtra,
    NotFound,
    ProtocolError,
    UnknownTask,
    Unsupported,
)
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.sampling import Constraint
from tpeft_deploy.runtime.server.operations.models import Models
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.operations.text_inference import TextInference
from tpeft_deploy.runtime.server.operations.texts import TOKEN, ContextExceeded, GenerationTarget, Texts
from tpeft_deploy.runtime.server.registry import CURRENT
from tpeft_deploy.runtime.server.telemetry.inference_events import GenerationFigures, InferenceEvent
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.meter import Meter, RateLeft
from tpeft_deploy.runtime.server.v2.messages import BASE, ServedVersion
from tpeft_deploy.runtime.text.images import FORMATS, ImageFile, PromptImages
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["ContextExceeded", "GenerationTarget", "Generations", "memory_of"]

_MADE = 160  # bytes of a generated token, and of each of the most probable ones beside it


class Generations:
    """Generates text for the clients of all protocols.

    Args:
        runtime: the runtime.
        bundle: the served bundle.
        models: lookup of models by name.
        meter: quotas of the tenants.
        accepting: returns whether requests are accepted.
        publish: called with the event of each request; on the event loop, so it must not block.
        pools: threads that open the text and the decoder.

    Attributes:
        texts: text of the bundle, that of the decoder if it has several components.
        encoders: embeddings and classification of texts.
    """

    def __init__(
        self,
        runtime: Runtime,
        bundle: Bundle,
        models: Models,
        meter: Meter,
        accepting: Callable[[], bool],
        publish: Callable[[InferenceEvent], None],
        pools: Pools,
    ) -> None:
        self._runtime = runtime
        self._models = models
        self._meter = meter
        self._publish = publish
        self._pools = pools
        self.texts, self.encoders = _texts(runtime, bundle, meter, accepting, publish, pools)
        self._bundle = bundle
        self._opened = False

    @cached_property
    def images(self) -> PromptImages:
        """Images of prompts, as the served bundle takes them.

        Raises:
            InputError: it takes none.
            Unsupported: Pillow is not installed.
        """
        doing = f"read the images of a prompt for bundle {self._models.bundle!r}"
        try:
            return PromptImages(self._bundle, doing, FORMATS)
        except MissingExtra as error:
            raise Unsupported(doing, problem=f"the server cannot: {error}") from error

    def with_features(self, prompt: list[int], images: Sequence[ImageFile]) -> list[int]:
        """Return a prompt with a token for each feature of its images.

        Args:
            prompt: tokens, one in the place of each image.
            images: image files.

        Raises:
            InputError: the bundle takes no images, the prompt has places for another number of them, or one is none.
            Unsupported: Pillow is not installed.
        """
        return self.images.expanded(prompt, images) if images else prompt

    @property
    def most_tokens(self) -> int:
        """Tokens of a sequence at most, those of its prompt included."""
        return self._runtime.most_tokens

    def rates(self, principal: Principal) -> dict[str, RateLeft]:
        """Return what is left of the tenant's limited rates, by what they count."""
        return self._meter.rates(principal.tenant, time.monotonic())

    async def text(self) -> ModelText:
        """Return the text of the bundle, which the first call opens.

        Raises:
            Unavailable: the server is starting or draining.
            InputError: the bundle has no decoder or no text.
            Unsupported: the packages for text are not installed.
        """
        if not self.most_tokens:
            raise InputError(
                f"generate text with bundle {self._models.bundle!r}",
                problem="it has no decoder, so it generates nothing",
            )
        text = await self.texts.open("generate text")
        if not self._opened:
            await self._pools.control.run(self._runtime.open_generation)
            self._opened = True
        return text

    def target(
        self, principal: Principal, model: str, version: str = "", adapter: str | None = None
    ) -> GenerationTarget:
        """Resolve a model's name: a task, `TASK@VERSION`, the base, or a weighted set `a:0.7+b:0.3`.

        Args:
            principal: the caller.
            model: name of the model.
            version: version number or alias, where it is no part of the name.
            adapter: name of the task, where the model is the base.

        Raises:
            Forbidden: the role allows no inference.
            NotFound: a task is not visible to the tenant.
            Unavailable: a task was unloaded.
            ProtocolError: a weight is no number, or the adapter is not that of the model.
        """
        allow(principal, Action.INFER)
        if adapter is not None and adapter != model:
            if model not in {BASE_TASK, self._models.bundle}:
                raise ProtocolError("adapter", expected=f"that of model {model[:200]!r}", got=repr(adapter[:200]))
            model = adapter
        model = f"{model}@{version}" if version else model
        if "+" not in model:
            try:
                found = self._version(principal, model)
            except NotFound:
                if not _is_weighted(model):
                    raise
            else:
                return GenerationTarget(found.task, None if found is BASE else found.key, (found,))
        return self._weighted(principal, model)

    def room(self, prompt: Sequence[int], most: int | None, default: int | None = None) -> int:
        """Return the number of tokens to generate at most.

        Args:
            prompt: tokens of the prompt.
            most: number that the client gave.
            default: number without one; None for as many as a sequence can have.

        Raises:
            ContextExceeded: a sequence cannot have so many tokens.
        """
        left = self.most_tokens - len(prompt)
        wanted = most if most is not None else max(1, left if default is None else min(left, default))
        if wanted > left:
            raise ContextExceeded(
                "generate text",
                expected=f"at most {self.most_tokens} tokens in all",
                got=f"a prompt of {len(prompt)} and {wanted} to generate",
                fix="Shorten the prompt, or ask for fewer tokens.",
            )
        return wanted

    def constraint(
        self, text: ModelText, schema: Mapping[str, Any] | None, field: str = "response_format"
    ) -> Callable[[], Constraint] | None:
        """Return what makes the constraint of a sequence to JSON of a schema; None without one.

        Args:
            text: text of the bundle.
            schema: JSON schema.
            field: field of the request, for messages.

        Raises:
            InputError: the schema is invalid or not supported.
            Unsupported: the package for it is not installed.
        """
        doing = f"read field '{field}'"
        try:
            return None if schema is None else text.constraint(schema)
        except InputError as error:
            raise InputError(doing, problem=str(error)) from error
        except MissingExtra as error:
            raise Unsupported(doing, problem=f"the server cannot: {error}") from error

    @asynccontextmanager
    async def started(
        self,
        principal: Principal,
        target: GenerationTarget,
        requests: Sequence[GenerationRequest],
        traceparent: str = "",
    ) -> AsyncIterator[list[Handle]]:
        """Begin all sequences of some requests, or none; those that run at the end of the block are cancelled.

        Args:
            principal: the caller.
            target: versions to run them on.
            requests: requests without tenant and task.
            traceparent: W3C trace context of the caller.

        Raises:
            TpeftError: as `Runtime.start`, and for a quota that is used up.
        """
        timing = Timing(time.monotonic())
        rows = sum(request.sampling.n for request in requests)
        new = sum(request.max_new_tokens * request.sampling.n for request in requests)
        spent = new + sum(len(request.prompt) for request in requests)
        # The one place where generation is charged.
        self._meter.spend_work(principal.tenant, rows, spent, timing.arrived)
        handles: list[Handle] = []

        def over(*, failed: bool) -> None:
            now = time.monotonic()
            timing.add(began, now, rows)
            took = now - timing.arrived
            prompts = sum(len(request.prompt) for request in requests) if handles else 0
            figures = GenerationFigures(prompts, timing.arrived, [list(handle.times) for handle in handles])
            self._publish(
                InferenceEvent(
                    *(principal.tenant, target.name, target.versions, rows, timing, took, failed),
                    traceparent=traceparent,
                    generation=figures,
                )
            )
            used = prompts + sum(len(handle.tokens) for handle in handles)
            self._meter.refund("tokens", principal.tenant, spent - used, now)

        began = timing.arrived
        try:
            for request in requests:
                own = replace(request, tenant=principal.tenant)
                handles += await self._runtime.start(own, target.task)
            began = time.monotonic()
            yield handles
        except BaseException as error:  # a client that left included
            over(failed=True)
            if isinstance(error, UnknownTask):  # the runtime's message may name other tenants' tasks
                raise NotFound(f"run model {target.name!r}", problem="a task of it was deleted meanwhile") from None
            raise
        else:
            over(failed=False)
        finally:
            for handle in handles:
                handle.cancel()

    def _version(self, principal: Principal, name: str) -> ServedVersion:
        task, _, version = name.partition("@")
        if task in {BASE_TASK, self._models.bundle}:
            if version not in {"", BASE.version, CURRENT}:
                raise NotFound(f"find model {task!r}", expected=f"version {BASE.version}", got=repr(version[:200]))
            return BASE
        return self._models.target(principal.tenant, task, version)

    def _weighted(self, principal: Principal, model: str) -> GenerationTarget:
        weights: dict[str, float] = {}
        versions = []
        for part in model.split("+"):
            name, _, weight = part.rpartition(":")
            if not _is_weighted(part):
                raise ProtocolError(
                    f"run model {model[:200]!r}", expected="a weighted set such as a:0.7+b:0.3", got=repr(part[:200])
                )
            found = self._version(principal, name)
            if found.key in weights:
                raise ProtocolError(f"run model {model[:200]!r}", expected="each task once", got=f"{name!r} twice")
            weights[found.key] = float(weight)
            versions.append(found)
        return GenerationTarget(versions[0].task, weights, tuple(versions))


def _texts(
    runtime: Runtime,
    bundle: Bundle,
    meter: Meter,
    accepting: Callable[[], bool],
    publish: Callable[[InferenceEvent], None],
    pools: Pools,
) -> tuple[Texts, TextInference]:
    """Return the text that is generated, and inference of texts by the encoder, which may be another component."""
    named = {own: part for own, part in bundle.components.items() if part.manifest.text}
    decoder = next((own for own, part in named.items() if part.manifest.decoder is not None), None)
    encoder = next((own for own, part in named.items() if part.manifest.decoder is None), decoder)
    opened = {
        own: Texts(bundle if own is None else named[own], bundle.manifest.name, accepting, pools)
        for own in (decoder, encoder)
    }
    component = encoder if bundle.parts else None
    encoders = TextInference(runtime, bundle, component, opened[encoder], meter, publish, pools)
    return opened[encoder if decoder is None else decoder], encoders


def memory_of(requests: Sequence[GenerationRequest], top: int = 0) -> int:
    """Return the bytes of images, and of the tokens of prompts and answers with `top` others beside each."""
    prompts = sum(len(request.prompt) for request in requests)
    made = sum(request.sampling.n * request.max_new_tokens for request in requests)
    arrays = {id(own): own for request in requests for own in (request.inputs or {}).values()}
    pixels = sum(own.nbytes for own in arrays.values() if isinstance(own, np.ndarray))
    return TOKEN * prompts + _MADE * (1 + top) * made + pixels


def _is_weighted(part: str) -> bool:
    name, colon, weight = part.rpartition(":")
    try:
        return bool(name and colon) and math.isfinite(float(weight))
    except ValueError:
        return False

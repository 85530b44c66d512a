"""Generation on the versions of a runtime: the decoder and the thread, made when the first sequence comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace

import onnxruntime

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import CapacityError, InputError, QueueFull, RunError
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.task_versions import Task, TaskVersions
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.generation.decoder import BankedDecoder, ResidentVersion
from tpeft_deploy.runtime.generation.handle import Detokeniser, GenerationRequest, Handle
from tpeft_deploy.runtime.generation.kv_cache import KvPlan
from tpeft_deploy.runtime.generation.loop import Generator
from tpeft_deploy.runtime.generation.orders import SequenceOrder
from tpeft_deploy.runtime.generation.sampling import Sampling
from tpeft_deploy.runtime.generation.sources.features import Images
from tpeft_deploy.runtime.generation.sources.source import RunSource, SourceEncoder
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured

__all__ = ["GenerationService"]

Inputs = Mapping[str, object] | None

_DOING = "generate tokens"
_BUDGET = 512  # tokens of a step
_CHUNK = 256  # tokens of a prompt in one run,
_SHARED_CHUNK = 64  # and where tenants share the processor: a short prompt of another waits for one run
# Tokens behind which one costs twice as much there, about: measured for a Llama of 5 M weights, more for larger models.
_DOUBLING = 1024


class GenerationService:
    """Generates on a runtime's versions; safe to use from several threads.

    Args:
        manifest: manifest of the bundle, with a decoder or not.
        session: session of the banked graph.
        residency: residency of the versions.
        loader: loads versions for async callers.
        versions: versions of the tasks.
        device: memory device, as ONNX Runtime names it.
        kv_bytes: bytes of the caches, as for `KvPlan.of`.
        max_tokens: tokens of a sequence, likewise.
        prefix_bytes: bytes of host memory for known prefixes.
        order: order of waiting sequences, which also gives tenants their shares; first come, first served by default.
        component: component of the graph; empty for the only one.
        open_rows: opens the graph for rows that are gathered already, where the bundle has one.
        open_choice: opens the choice graph, where the bundle has one.
        source: manifest of the decoder's source component, and what runs it.
        max_source: positions of a slot's memory, as for `KvPlan.of`.

    Attributes:
        device_choice: whether logits stay on the device where the choice graph decides; read when the decoder is made.
            By default on devices other than the CPU, where copying them costs nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        session: Session | Captured,
        residency: Residency,
        loader: AdapterLoader,
        versions: TaskVersions,
        device: str,
        *,
        kv_bytes: int | None,
        max_tokens: int | None,
        prefix_bytes: int,
        order: SequenceOrder | None = None,
        component: str = "",
        open_rows: Callable[[], Session | None] = lambda: None,
        open_choice: Callable[[], onnxruntime.InferenceSession | None] = lambda: None,
        source: tuple[Manifest, RunSource] | None = None,
        max_source: int | None = None,
    ) -> None:
        self._manifest = manifest
        self._component = component
        self._open_rows = open_rows
        self._open_choice = open_choice
        self.device_choice = device != "cpu"
        self._session = session
        self._residency = residency
        self._loader = loader
        self._versions = versions
        self._device = device
        self._plan: KvPlan | None = None
        self._source: SourceEncoder | Images | None = None
        if manifest.decoder is not None:
            self._plan = KvPlan.of(manifest, kv_bytes, max_tokens, max_source, None if source is None else source[0])
            if source is not None and manifest.decoder.features:
                self._source = Images(manifest.decoder, *source)
            elif source is not None:
                self._source = SourceEncoder(manifest.decoder, *source, self._plan.source)
        self._prefix_bytes = prefix_bytes
        self._order = order
        self._lock = threading.Lock()
        self._made: Generator | None = None
        self._decoder: BankedDecoder | None = None
        self._closed = False

    @staticmethod
    def prompts(
        prompts: Sequence[Sequence[int]], inputs: Sequence[Inputs] | None
    ) -> tuple[Sequence[Sequence[int]], Sequence[Inputs]]:
        """Return prompts and the inputs of each; empty prompts where inputs alone are given.

        Raises:
            InputError: the numbers differ.
        """
        if inputs is None:
            return prompts, [None] * len(prompts)
        if isinstance(inputs, Mapping) or (len(prompts) and len(inputs) != len(prompts)):
            got = "one dict" if isinstance(inputs, Mapping) else len(inputs)
            raise InputError(_DOING, expected=f"a list of inputs for each of {len(prompts)} prompts", got=got)
        return prompts if len(prompts) else [()] * len(inputs), inputs

    @staticmethod
    def tasks(prompts: Sequence[Sequence[int]], task: Task | None, tasks: Sequence[Task] | None) -> Sequence[Task]:
        """Return one task for each prompt.

        Raises:
            InputError: both are given, or the numbers differ.
        """
        if tasks is None:
            return [BASE_TASK if task is None else task] * len(prompts)
        if task is not None:
            raise InputError(_DOING, expected="task or tasks", got="both")
        if isinstance(tasks, str) or len(tasks) != len(prompts):
            got = repr(tasks) if isinstance(tasks, str) else f"{len(tasks)} tasks"
            raise InputError(_DOING, expected=f"a list of one task per prompt, {len(prompts)}", got=got)
        return tasks

    @staticmethod
    def request(
        max_new_tokens: int,
        stop: Sequence[int],
        sampling: Sampling | None,
        timeout: float | None,
        tenant: str,
        priority: int,
        text: Callable[[], Detokeniser] | None = None,
    ) -> GenerationRequest:
        """Return a request without a prompt.

        Raises:
            InputError: a stop token is none, or `sampling` asks for several sequences.
        """
        how = Sampling() if sampling is None else sampling
        if how.n != 1:
            raise InputError(_DOING, expected="sampling with n of 1", got=how.n, fix="Give the prompt n times.")
        if stop:
            how = replace(how, stop_tokens=(*how.stop_tokens, *stop))
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        return GenerationRequest(
            (), max_new_tokens, how, tenant=tenant, priority=priority, deadline=deadline, text=text
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tasks: Sequence[Task],
        inputs: Sequence[Inputs],
        like: GenerationRequest,
    ) -> list[list[int]]:
        """Continue prompts, and wait for the results.

        Args:
            prompts: lists of tokens.
            tasks: one for each.
            inputs: inputs of the source component for each.
            like: request with what is equal for all.

        Raises:
            TpeftError: one cannot be continued; the others are ended.
        """
        generator = self._generator()
        found = [
            self._prepared(generator, replace(like, prompt=prompt, inputs=own, scored=False), task, f"prompt {row}")
            for row, (prompt, task, own) in enumerate(zip(prompts, tasks, inputs, strict=True))
        ]
        handles: list[Handle] = []
        try:
            for request, version in found:
                handles.append(self._submit(generator, request, version, handles))
            return [[token.id for token in handle.result().tokens] for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    async def start_one(
        self, prompt: Sequence[int], task: Task | None, inputs: Inputs, like: GenerationRequest
    ) -> Handle:
        """Begin one sequence.

        Args:
            prompt: tokens.
            task: a task or weighted set; None for the base.
            inputs: inputs of the source component.
            like: request without the prompt.
        """
        request = replace(like, prompt=prompt, inputs=inputs)
        return (await self.start(request, BASE_TASK if task is None else task))[0]

    async def start(self, request: GenerationRequest, task: Task | None = None) -> list[Handle]:
        """Begin all `n` sequences of a request, or none.

        Args:
            request: request; its task is a name, or None for the base.
            task: task or weighted set, in the place of the request's.

        Raises:
            TpeftError: it cannot be run.
        """
        generator = self._generator()
        own = task if task is not None else request.task
        request, version = self._prepared(generator, request, own, "the prompt")
        handles: list[Handle] = []
        try:
            for choice in range(request.sampling.n):
                held = self._residency.try_acquire([version], new=True)
                if held is None:
                    left = None if request.deadline == math.inf else max(request.deadline - time.monotonic(), 0)
                    held = await self._loader.acquire([version], left, request.tenant)
                own_version = ResidentVersion(held, self._residency)
                handles.append(generator.submit(request, choice=choice, version=own_version))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def open(self) -> None:
        """Make the decoder and its caches, if there are none yet."""
        self._generator()

    @property
    def most_tokens(self) -> int:
        """Tokens of a sequence at most: the last one needs no room in a cache."""
        return 0 if self._plan is None else self._plan.length + 1

    def acquire(self, task: Hashable) -> ResidentVersion:
        """Acquire the version that a task has now, for the generator."""
        return self._resident(self._found(task, _DOING))

    def usage(self) -> dict[str, int]:
        """Bytes and slots; nothing for a bundle without a decoder."""
        if self._plan is None:
            return {}
        stats, decoder = self.stats(), self._decoder
        return {
            "kv_bytes": 0 if stats is None else self._plan.nbytes,
            "slots": self._plan.slots,
            "slots_taken": 0 if stats is None else stats.running,
            "prefix_bytes": 0 if stats is None else stats.cached_prefix_bytes,
            "slot_adapter_bytes": 0 if decoder is None else decoder.adapter_bytes,
        }

    def stats(self) -> GenerationStats | None:
        """Return the figures of the generator, if there is one."""
        made = self._made
        return None if made is None else made.stats()

    def forget(self, version: Version) -> None:
        """Drop what is known of prefixes on a version that was retired."""
        made = self._made
        if made is not None:
            made.forget(version.digest)

    def close(self) -> None:
        """End all sequences with an error, and free the caches."""
        with self._lock:
            self._closed, made = True, self._made
        if made is not None:
            made.close()
            self._made = self._decoder = None

    def _generator(self) -> Generator:
        with self._lock:
            if self._closed:
                raise RunError(_DOING, problem="the runtime is closed", fix="Open the bundle again.")
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> Generator:
        if self._plan is None:
            raise InputError(
                f"{_DOING} with bundle {self._manifest.name!r}",
                expected="a bundle with a decoder",
                got="one without",
                fix="Export the language model again with generation=True (--generation).",
            )
        if isinstance(self._session, Captured):
            raise InputError(_DOING, expected="a runtime without cuda_graphs", got="one with cuda_graphs")
        rows = self._open_rows()
        decoder = self._decoder = BankedDecoder(
            self._manifest,
            self._session if rows is None else rows,
            self._residency,
            self._plan,
            self._device,
            self._component,
            gathered=rows is not None,
            source=self._source,
            choice=self._open_choice() if self.device_choice else None,
        )
        budget = max(_BUDGET, 2 * decoder.slots)
        shared = self._order is not None and self._device == "cpu"
        return Generator(
            decoder,
            self,
            budget=budget,
            chunk=_SHARED_CHUNK if shared else _CHUNK,
            doubling=_DOUBLING if shared else None,
            order=self._order,
            prefix_bytes=self._prefix_bytes,
        )

    def _found(self, task: object, doing: str) -> Version:
        if task is None:
            return self._versions.base
        return self._versions.find(task, doing=doing)  # type: ignore[arg-type]  # refuses other types

    def _prepared(
        self, generator: Generator, request: GenerationRequest, task: object, name: str
    ) -> tuple[GenerationRequest, Version]:
        """A request that was checked, and the version of its task, before anything is loaded."""
        shown = dict(task) if isinstance(task, Mapping) else repr(task)
        version = self._found(task, f"generate on task {shown} for {name}")
        request = replace(request, task=version.name)
        if self._source is not None:
            request = self._source.prepare(request, f"{_DOING} for {name}")
        elif request.inputs is not None:
            raise InputError(
                f"{_DOING} for {name}",
                expected="no inputs, as the bundle's decoder reads tokens alone",
                got=", ".join(map(repr, request.inputs)) or "an empty dict",
            )
        generator.check(request)
        return request, version

    def _resident(self, version: Version) -> ResidentVersion:
        return ResidentVersion(self._residency.acquire([version], new=True), self._residency)

    def _submit(
        self, generator: Generator, request: GenerationRequest, version: Version, before: Sequence[Handle]
    ) -> Handle:
        """Submit a request, once sequences of the same call have made room where there is none."""
        while True:
            try:
                return generator.submit(request, version=self._resident(version))
            except (CapacityError, QueueFull):
                running = [handle.future for handle in before if not handle.future.done()]
                if not running:
                    raise
            wait(running, return_when=FIRST_COMPLETED)

"""The key paths: work of this package that is paid per request, per token or per load.

Each is a context manager that yields a function of a number of repetitions.  The model is tiny, so that ONNX Runtime's
part is small.  Nothing here imports torch, which takes minutes under callgrind.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvloop

from benchmarks.server_echo import PIXELS, TASKS
from benchmarks.server_layers import Ask, in_process, through_http
from tpeft_deploy import Bundle, Runtime, load_adapter
from tpeft_deploy.bundle import fit
from tpeft_deploy.runtime.adapters.bank import Bank, Layout
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.loop import Generator
from tpeft_deploy.runtime.generation.sampling import Token
from tpeft_deploy.runtime.server.openai.answers import ChatDocuments
from tpeft_deploy.runtime.server.openai.sse import event
from tpeft_deploy.runtime.server.registry import state as registry
from tpeft_deploy.tucker import Array

Repeat = Callable[[int], None]
VOCABULARY, SEQUENCES, TOKENS = 40, 8, 16


def rows(count: int) -> dict[str, Array]:
    return {"input": np.random.default_rng(0).standard_normal((count, PIXELS)).astype(np.float32)}


def repeated(call: Callable[[], object]) -> Repeat:
    def repeat(times: int) -> None:
        for _ in range(times):
            call()

    return repeat


@contextmanager
def asked(ask: Ask) -> Iterator[Repeat]:
    async def several(times: int) -> None:
        for number in range(times):
            await ask(number)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield lambda times: runner.run(several(times))


@contextmanager
def reference(_place: Path) -> Iterator[Repeat]:
    """Nothing of this package: differs only if the interpreter, NumPy or the C library does."""
    values = rows(8)["input"]
    document = {"inputs": [{"name": str(number), "data": list(range(20))} for number in range(20)]}

    def call() -> None:
        text = json.dumps(document, sort_keys=True)
        names = {own["name"]: sum(own["data"]) for own in json.loads(text)["inputs"]}
        found = [values[number % 8] @ values[number % 7] + total for number, total in enumerate(names.values())]
        sorted(f"{value:.3f}" for value in np.stack(found).tolist())

    yield repeated(call)


@contextmanager
def run_mixed(place: Path) -> Iterator[Repeat]:
    inputs, tasks = rows(8), [f"task-{row % TASKS}" for row in range(8)]
    with Runtime(place / "bundle", provider="cpu", threads=1) as runtime:
        yield repeated(lambda: runtime.run(inputs, tasks=tasks))


@contextmanager
def infer_one(place: Path) -> Iterator[Repeat]:
    inputs = rows(1)
    with Runtime(place / "bundle", provider="cpu", threads=1) as runtime:

        async def ask(number: int) -> None:
            await runtime.infer(inputs, f"task-{number % TASKS}")

        with asked(ask) as repeat:
            yield repeat


@contextmanager
def served(place: Path, document: bytes | None) -> Iterator[Repeat]:
    # A thread that looks for changes by the clock would do so more often where the processor is slower.
    registry.POLL_SECONDS = 1e6
    with (
        in_process(Bundle.open(place / "bundle"), place / "state") as (_, _, app, state),
        asked(through_http(app, state, document)) as repeat,
    ):
        yield repeat


def binary_request(place: Path) -> AbstractContextManager[Repeat]:
    return served(place, None)


def json_request(place: Path) -> AbstractContextManager[Repeat]:
    data = [float(f"{value:.4f}") for value in rows(1)["input"][0]]
    tensor = {"name": "input", "shape": [1, PIXELS], "datatype": "FP32", "data": data}
    return served(place, json.dumps({"inputs": [tensor]}).encode())


@contextmanager
def key_and_quota(place: Path) -> Iterator[Repeat]:
    registry.POLL_SECONDS = 1e6
    with in_process(Bundle.open(place / "bundle"), place / "state") as (_, service, _, state):
        header = f"Bearer {state.keys.create('tenant', 'infer', by='a benchmark')[1]}"

        def call() -> None:
            service.admit(service.authenticate(header))

        yield repeated(call)


@contextmanager
def open_bundle(place: Path) -> Iterator[Repeat]:
    yield repeated(lambda: Bundle.open(place / "bundle"))


@contextmanager
def read_peft(place: Path) -> Iterator[Repeat]:
    yield repeated(lambda: load_adapter(place / "peft"))


@contextmanager
def write_row(place: Path) -> Iterator[Repeat]:
    """A task that is not resident: its adapter from the bundle, laid out, into a row of the bank."""
    bundle = Bundle.open(place / "bundle")
    layout = Layout.of(bundle)

    def content() -> dict[str, Array]:
        return fit.named(bundle.manifest, bundle.fill(bundle.adapter("task-1")))

    shapes = layout.widest([{name: row.shape for name, row in content().items()}])
    bank = Bank.allocate(layout, shapes, 2, "cpu")
    yield repeated(lambda: bank.write(1, content()))


class ConstantDecoder:
    """A decoder without a model."""

    def __init__(self) -> None:
        self.slots, self.length, self.vocabulary = SEQUENCES, 128, VOCABULARY
        self.logits = np.random.default_rng(0).standard_normal((SEQUENCES, VOCABULARY)).astype(np.float32)

    def enter(self, slot: int, sequence: Any) -> None: ...

    def prefill(self, slots: Sequence[int], *_: Any) -> Array:
        return self.logits[: len(slots)]

    def decode(self, slots: Sequence[int], *_: Any) -> Array:
        return self.logits[: len(slots)]

    def move(self, source: int, target: int, length: int) -> None: ...

    def save(self, slot: int, start: int, length: int) -> Array:
        raise NotImplementedError  # no prefixes are kept

    def restore(self, slot: int, start: int, block: Any) -> None: ...


class Versions:
    """Acquires nothing."""

    def acquire(self, task: Hashable) -> Any:
        return SimpleNamespace(key=task, release=lambda: None)


@contextmanager
def generate(_place: Path) -> Iterator[Repeat]:
    """Eight sequences of 16 tokens: scheduler, sampling and handles."""
    generator = Generator(ConstantDecoder(), Versions())
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=1)

    def call() -> None:
        requests = [
            GenerationRequest([1, 2, 3, number], max_new_tokens=TOKENS, sampling=sampling, task=number % TASKS)
            for number in range(SEQUENCES)
        ]
        handles = [generator.submit(request) for request in requests]
        for handle in handles:
            handle.result()

    try:
        yield repeated(call)
    finally:
        generator.close()


@contextmanager
def stream_events(_place: Path) -> Iterator[Repeat]:
    """One token as an event of OpenAI's API."""
    answer = ChatDocuments("1", "task-1", lambda _: b"word", frozenset(), None)
    token = Token(5, -0.5, (), "word")

    def call() -> None:
        for choice in answer.deltas(0, token):
            event(answer.chunk([choice], None, with_usage=False))

    yield repeated(call)


Open = Callable[[Path], AbstractContextManager[Repeat]]
REFERENCE = "reference: Python and NumPy alone"
PATHS: dict[str, tuple[Open, int]] = {  # with numbers of repetitions: multiples of 16 turn through tasks and tenants
    REFERENCE: (reference, 32),
    "run: 8 rows of 4 tasks": (run_mixed, 64),
    "infer: one row through the batcher": (infer_one, 64),
    "V2 request, binary": (binary_request, 64),
    "V2 request, JSON": (json_request, 64),
    "key and quota of a request": (key_and_quota, 256),
    "generate: 8 sequences of 16 tokens": (generate, 8),
    "a token as an event of a chat": (stream_events, 1024),
    "open a bundle": (open_bundle, 16),
    "read a PEFT adapter of 72 layers": (read_peft, 4),
    "load a task into the bank": (write_row, 16),
}

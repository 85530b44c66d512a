"""Generators on decoders without a model, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.helpers.runtime.decoders import FakeDecoder, FakeVersions
from tests.helpers.waiting import SECONDS
from tpeft_deploy.runtime.generation.handle import Handle
from tpeft_deploy.runtime.generation.loop import Generator


class Held:
    """Lets a test stop the decoder before a call."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, name: str, _slots: Sequence[int]) -> None:
        if name in self.names and not self.go_on.is_set():
            self.reached.set()
            assert self.go_on.wait(SECONDS)


@contextmanager
def generating(decoder: FakeDecoder, **settings: Any) -> Iterator[tuple[Generator, FakeVersions]]:
    versions = FakeVersions()
    generator = Generator(decoder, versions, **settings)
    try:
        yield generator, versions
    finally:
        if isinstance(decoder.before, Held):
            decoder.before.go_on.set()
        generator.close()
    assert versions.released_once()
    assert generator.stats().running == generator.stats().waiting == 0


def ids(handle: Handle) -> list[int]:
    return [token.id for token in handle.result(SECONDS).tokens]

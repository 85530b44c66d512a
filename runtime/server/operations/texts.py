"""The text of the served bundle, and what the name of a model stands for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import InputError, MissingExtra, Unavailable, Unsupported
from tpeft_deploy.runtime.adapters.task_versions import Task
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.v2.messages import ServedVersion
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["TOKEN", "ContextExceeded", "GenerationTarget", "Texts"]

TOKEN = 48
"""Bytes of a token in a list."""


class ContextExceeded(InputError):
    """Raised for a prompt and a number of new tokens that are more than a sequence can have."""


@dataclass(frozen=True)
class GenerationTarget:
    """What a model's name stands for.

    Attributes:
        name: name in events and metrics: that of the task, or the first of a weighted set.
        task: task or weighted set in the runtime; None for the base.
        versions: adapter versions.
    """

    name: str
    task: Task | None
    versions: tuple[ServedVersion, ...]

    @property
    def version(self) -> str:
        """Version number; empty for a weighted set."""
        return self.versions[0].version if len(self.versions) == 1 else ""


class Texts:
    """The text of a component of the served bundle, which the first use opens.

    Args:
        bundle: the component, or the bundle if it has one graph.
        name: name of the bundle, for messages.
        accepting: returns whether requests are accepted.
        pools: threads that open the text.
    """

    def __init__(self, bundle: Bundle, name: str, accepting: Callable[[], bool], pools: Pools) -> None:
        self._bundle, self._name = bundle, name
        self._accepting = accepting
        self._pools = pools
        self._lock = threading.Lock()
        self._text: ModelText | None = None

    async def open(self, doing: str) -> ModelText:
        """Return the text.

        Args:
            doing: purpose, for messages.

        Raises:
            Unavailable: the server is starting or draining.
            InputError: the bundle has no text.
            Unsupported: the packages for text are not installed.
        """
        if not self._accepting():
            raise Unavailable(doing, problem="the server is starting or draining", fix="Try again shortly.")
        if self._text is not None:
            return self._text
        if not self._bundle.manifest.text:
            raise InputError(f"{doing} with bundle {self._name!r}", problem="it has no tokenizer")
        try:
            return await self._pools.control.run(self._read)
        except MissingExtra as error:
            raise Unsupported(doing, problem=f"the server cannot: {error}") from error

    def _read(self) -> ModelText:
        with self._lock:
            if self._text is None:
                self._text = ModelText.open(self._bundle)
            return self._text

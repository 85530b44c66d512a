"""What a long call tells while it works: its stage, and how many of its parts are done."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "Stage", "silent"]

Progress = Callable[[str], None]


class Stage(str):
    """The name of a stage that knows how far the work is; a plain string is a stage of unknown length.

    Args:
        text: what is being done.
        done: parts that are finished.
        total: parts in all, at least 1.
    """

    __slots__ = ("done", "total")
    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> Stage:
        """A string with two numbers."""
        stage = super().__new__(cls, text)
        stage.done, stage.total = done, total
        return stage


def silent(stage: str) -> None:
    """A listener that does nothing."""
    del stage

"""Progress callbacks of long calls: the current stage, and optionally the number of parts done."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "Stage", "silent"]

Progress = Callable[[str], None]


class Stage(str):
    """Description of a stage with a known number of parts; a plain string is a stage of unknown length.

    Args:
        text: description of the stage.
        done: number of finished parts.
        total: number of parts, at least 1.
    """

    __slots__ = ("done", "total")
    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> Stage:
        """Create the string and set both numbers."""
        stage = super().__new__(cls, text)
        stage.done, stage.total = done, total
        return stage


def silent(stage: str) -> None:
    """Ignore progress; the default callback."""
    del stage

"""Progress callbacks of long calls: the current stage, and optionally the number of parts done."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "Stage", "Steps", "silent"]

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

    def renamed(self, text: str) -> Stage:
        """Return the same part under another description."""
        return Stage(text, self.done, self.total)


class Steps:
    """A callback that counts the stages of a call that has a known number of them.

    Args:
        progress: callback that gets each stage with its number.
        total: number of stages of the whole call.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._begun = progress, total, 0

    def __call__(self, stage: str) -> None:
        """Report that the next stage begins."""
        self._begun = min(self._begun + 1, self._total)
        self._progress(Stage(stage, self._begun - 1, self._total))

    def part(self, stage: str) -> None:
        """Report a part of the current stage, which does not count."""
        self._progress(Stage(stage, max(self._begun - 1, 0), self._total))


def silent(stage: str) -> None:
    """Ignore progress; the default callback."""
    del stage

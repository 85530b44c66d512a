"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first stop string in a text, and lets no part of it through.

    The result does not depend on how the text is cut: the match is the one that is complete first, the longest of
    several.  The time is linear in the text (Knuth, Morris and Pratt 1977, one automaton per stop string).

    Args:
        stops: texts to find, none of them empty.

    Attributes:
        found: stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # per stop string, characters of it that the text ends with
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text; returns text that cannot be part of a stop string, and nothing after a match."""
        if self.found is not None:
            return ""
        held = self._held + piece
        for end in range(len(self._held) + 1, len(held) + 1):
            complete = [stop for index, (stop, _) in enumerate(self._stops) if self._step(index, held[end - 1])]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                return held[: end - len(self.found)]
        kept = len(held) - max(self._matched, default=0)
        self._held = held[kept:]
        return held[:kept]

    def flush(self) -> str:
        """Return what was held back, as the text is over."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, index: int, character: str) -> bool:
        stop, borders = self._stops[index]
        matched = self._matched[index]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched == len(stop)


def _borders(text: str) -> list[int]:
    """For each prefix of a text, the length of its longest proper prefix that is also its suffix."""
    borders, length = [0] * len(text), 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders

"""Tool calls in generated text: readers of an answer that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Protocol

from tpeft_deploy.runtime.text.tool_format import JSON_LIST, ToolFormat
from tpeft_deploy.runtime.text.tool_json import JsonSpan, NoCallError, ToolCall, calls

__all__ = ["AnswerPart", "CallReader", "NamedCallReader", "ToolCallParser"]

_HEAD = 160  # characters between a marker and the JSON of its calls
_SPACE = re.compile(r"\s*")
_NAMED = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?")

AnswerPart = str | ToolCall


class CallReader(Protocol):
    """Reader of one answer."""

    def push(self, text: str) -> list[AnswerPart]:
        """Add text; returns the content and the calls that are settled with it."""

    def flush(self) -> list[AnswerPart]:
        """Return the rest, as the text is over."""


class NamedCallReader:
    """Reads text that is nothing but the arguments of one function.

    Args:
        name: name of the function.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> list[AnswerPart]:
        """Add text; returns the call, or arguments that continue it."""
        if not text:
            return []
        begins, self._begun = not self._begun, True
        return [ToolCall(self._name, text, begins)]

    def flush(self) -> list[AnswerPart]:
        """Return nothing, as no text is held back."""
        return []


class ToolCallParser:
    """Finds the calls in a text.

    Content and calls do not depend on how the text is cut.  A call is complete before it is returned: what begins like
    one and is no JSON of a call, or calls a function that is not known, is content, unchanged.  Space between calls,
    and before and behind them where there is nothing else, is part of neither.

    Args:
        form: format of the text.
        names: names of the functions.
        several: whether there may be more than one call; else all but the first are left out.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, several: bool = True) -> None:
        self._form, self._names, self._several = form, frozenset(names), several
        self._held = ""
        self._region: _Region | None = None
        self._space = ""  # behind a call or at the beginning
        self._blank = True  # whether there was nothing but space since
        self._called = False

    def push(self, text: str) -> list[AnswerPart]:
        """Add text; returns the content and the calls that are settled with it."""
        self._held += text
        return self._read(over=False) if text else []

    def flush(self) -> list[AnswerPart]:
        """Return the rest, as the text is over."""
        found = self._read(over=True)
        if self._space and not self._called:
            found.append(self._space)
        self._space = ""
        return _joined(found)

    def _read(self, *, over: bool) -> list[AnswerPart]:
        found: list[AnswerPart] = []
        while self._held:
            if self._region is None and not self._begin(found, over):
                break
            if self._region is not None and not self._within(self._region, found, over):
                break
        return _joined(found)

    def _begin(self, found: list[AnswerPart], over: bool) -> bool:
        """Look for the beginning of calls, and settle the content before; False if more text is needed."""
        held, form = self._held, self._form
        if form.bare is not None and self._blank:
            at = self._bare_start(form.bare)
            rest = held[at : at + max(1, len(form.marker))]
            if not over and (not rest or (form.marker.startswith(rest) and rest != form.marker)):
                return False
            if rest[:1] == "{" or (form.marker and rest == form.marker):
                head = len(form.marker) if rest == form.marker else 0
                self._region = _Region(form, self._names, at + max(1, head), at + head)
                return True
            if form is JSON_LIST and self._called and held[at:].strip() == "]":
                self._held = held if not over else ""
                return False
        at = held.find(form.marker) if form.marker else -1
        if at >= 0:
            self._settle(held[:at], found)
            self._held = held[at:]
            self._region = _Region(form, self._names, len(form.marker), len(form.marker))
            return True
        kept = 0 if over or not form.marker else _partial(held, form.marker)
        self._settle(held[: len(held) - kept], found)
        self._held = held[len(held) - kept :]
        return False

    def _bare_start(self, separator: str) -> int:
        """Place of what follows the separator, or of the text if none was needed."""
        at = _after_space(self._held, 0)
        separators = ("[" if self._form is JSON_LIST else "") if not self._called else separator
        if separators and self._held.startswith(separators, at):
            at = _after_space(self._held, at + len(separators))
        return at

    def _within(self, region: _Region, found: list[AnswerPart], over: bool) -> bool:
        """Read on in a region; False if more text is needed."""
        try:
            end = region.end(self._held, over)
        except NoCallError:
            self._region = None
            self._settle(self._held[: region.head], found)
            self._held = self._held[region.head :]
            return True
        if end is None:
            return False
        self._region, self._held = None, self._held[end:]
        most = None if self._several else 0 if self._called else 1
        found += region.calls[:most]
        self._space, self._blank, self._called = "", True, True
        return True

    def _settle(self, text: str, found: list[AnswerPart]) -> None:
        if self._blank and not text.strip():
            self._space += text
        elif text:
            found.append(self._space + text)
            self._space, self._blank = "", False


class _Region:
    """Text from a marker to the end of the calls behind it.

    Args:
        form: format of the text.
        names: names of the functions.
        head: number of characters that are content if there are no calls, and in which no other marker begins.
        at: place from which JSON is looked for.

    Attributes:
        head: as given.
        calls: calls, once the JSON is complete.
    """

    def __init__(self, form: ToolFormat, names: frozenset[str], head: int, at: int) -> None:
        self.head = head
        self.calls: list[ToolCall] = []
        self._form, self._names, self._at = form, names, at
        self._name: str | None = None
        self._json: JsonSpan | None = None
        self._end: int | None = None

    def end(self, text: str, over: bool) -> int | None:
        """Return the end of the region; None if more text is needed.

        Args:
            text: text from the beginning of the region on.
            over: whether there is no more text.

        Raises:
            NoCallError: there are no calls.
        """
        if self._json is None:
            self._json = self._opened(text)
        if self._json is not None and self._end is None:
            start = self._json.start
            self._end = self._json.end(text)
            if self._end is not None:
                self.calls = calls(text[start : self._end], self._name, self._names, strict=self._form.bare == ";")
        if self._end is None:
            if over:
                raise NoCallError
            return None
        return self._closed(text, self._end, over)

    def _opened(self, text: str) -> JsonSpan | None:
        """JSON behind the marker; None if more text is needed."""
        at = _after_space(text, self._at)
        if at == len(text) or text[at] in self._form.opening:
            if at - self._at > _HEAD:
                raise NoCallError
            return None if at == len(text) else JsonSpan(at)
        if not self._form.named:
            raise NoCallError
        at = text.find("{", self._at, self._at + _HEAD)
        if at < 0:
            if len(text) - self._at >= _HEAD:
                raise NoCallError
            return None
        named = _NAMED.fullmatch(text, self._at, at)
        if named is None:
            raise NoCallError
        self._name = named[1]
        return JsonSpan(at)

    def _closed(self, text: str, end: int, over: bool) -> int | None:
        closer = self._form.closer
        if not closer:
            return end
        at = _after_space(text, end)
        if text.startswith(closer, at):
            return at + len(closer)
        if not closer.startswith(text[at:]):
            raise NoCallError
        return len(text) if over else None


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _partial(text: str, marker: str) -> int:
    """Length of the longest beginning of a marker that a text ends with."""
    return next((size for size in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:size])), 0)


def _joined(pieces: Sequence[AnswerPart]) -> list[AnswerPart]:
    """Pieces with adjacent content as one."""
    found: list[AnswerPart] = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found

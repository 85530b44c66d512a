"""Regular expressions with lookarounds, flags and Unicode, matched in time linear in the text.

A pattern parsed by `re` is compiled to a program of tests and branches.  Whether the program matches from an
instruction at a position of the text does not depend on the path to it, so each pair is visited once (as in RE2's
BitState), and a lookaround is evaluated once per position.  Single characters are matched by `re`, so that case,
categories and ranges have the same meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from re import _parser  # the pattern parser, which has no public name
from typing import Any, NamedTuple

__all__ = ["NotRegular", "Program", "ProgramTooLarge"]

_MOST = 20_000  # instructions
_TYPES = re.ASCII | re.LOCALE | re.UNICODE
_CASES = 50_000  # steps of `re` for a case-insensitive class beyond ASCII
_EMPTY_IS_NO_BOUNDARY = re.match(r"\B", "") is not None  # depends on the version of Python


class NotRegular(Exception):
    """Raised for a pattern that cannot be matched in linear time; names the part."""


class ProgramTooLarge(Exception):
    """Raised for a pattern with repeats that make the program exceed its limit."""


class _Letter(NamedTuple):
    test: Callable[[str], object]


class _Jump(NamedTuple):
    to: tuple[int, ...]  # none: a dead end


class _Place(NamedTuple):
    kind: str
    word: Callable[[str], object]


class _Look(NamedTuple):
    program: _Code
    behind: int | None  # width of a lookbehind
    wanted: bool


_Code = list[Any]
_NAMES = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}


class Program:
    """A parsed pattern.

    Args:
        tree: pattern as parsed by `re`.
        flags: flags of the whole pattern.
        whole: True to match a whole text, as `re.fullmatch`; False to match its beginning, as `re.match`.
        spend: function that is called with the number of steps, and may raise.

    Raises:
        NotRegular, ProgramTooLarge: the pattern cannot be matched in linear time, or its program is too large.
        re.error: a lookbehind has no fixed width.
    """

    def __init__(self, tree: Any, flags: int, *, whole: bool, spend: Callable[[int], None]) -> None:
        self._whole, self._spend = whole, spend
        self._tests: dict[tuple[str, int], Callable[[str], object]] = {}
        self._size = 0
        self._code = self._compiled(tree, flags)

    def matches(self, text: str) -> bool:
        """Whether the pattern matches a text of one line."""
        return self._run(self._code, text, 0, whole=self._whole, looks={})

    def _compiled(self, tree: Any, flags: int) -> _Code:
        code: _Code = []
        self._add(code, tree, flags)
        return code

    def _put(self, code: _Code, instruction: Any) -> int:
        self._size += 1
        if self._size > _MOST:
            raise ProgramTooLarge(f"more than {_MOST} instructions")
        code.append(instruction)
        return len(code) - 1

    def _add(self, code: _Code, tree: Any, flags: int) -> None:
        for operator, value in tree:
            kind = str(operator)
            if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
                self._put(code, _Letter(self._test(kind, value, flags)))
            elif kind == "AT":
                self._put(code, _Place(str(value), self._test("IN", [("CATEGORY", "CATEGORY_WORD")], flags)))
            elif kind == "SUBPATTERN":
                _, added, removed, body = value
                kept = flags & ~_TYPES if added & _TYPES else flags
                self._add(code, body, (kept | added) & ~removed)
            elif kind == "BRANCH":
                self._add_branches(code, value[1], flags)
            elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
                self._add_repeat(code, value, flags)
            elif kind in ("ASSERT", "ASSERT_NOT"):
                self._add_look(code, value, flags, wanted=kind == "ASSERT")
            elif kind == "FAILURE":
                self._put(code, _Jump(()))
            else:
                raise NotRegular(f"it has {_NAMES.get(kind, kind.lower())}")

    def _add_branches(self, code: _Code, branches: Any, flags: int) -> None:
        choice, ends, starts = self._put(code, None), [], []
        for branch in branches:
            starts.append(len(code))
            self._add(code, branch, flags)
            ends.append(self._put(code, None))
        code[choice] = _Jump(tuple(starts))
        for end in ends:
            code[end] = _Jump((len(code),))

    def _add_repeat(self, code: _Code, value: Any, flags: int) -> None:
        least, most, body = value
        if not body.getwidth()[1] and least > 1:  # repeating an empty match changes nothing
            least = 1
        for _ in range(least):
            self._put(code, _Jump((len(code) + 1,)))
            self._add(code, body, flags)
        if most == _parser.MAXREPEAT or not body.getwidth()[1]:
            start = self._put(code, None)
            self._add(code, body, flags)
            self._put(code, _Jump((start,)))
            code[start] = _Jump((start + 1, len(code)))
            return
        choices = []
        for _ in range(most - least):
            choices.append(self._put(code, None))
            self._add(code, body, flags)
        for choice in choices:
            code[choice] = _Jump((choice + 1, len(code)))

    def _add_look(self, code: _Code, value: Any, flags: int, *, wanted: bool) -> None:
        direction, body = value
        behind = None
        if direction < 0:
            behind, widest = body.getwidth()
            if behind != widest:
                raise re.error("look-behind requires fixed-width pattern")
        self._put(code, _Look(self._compiled(body, flags), behind, wanted))

    def _test(self, kind: str, value: Any, flags: int) -> Callable[[str], object]:
        source = _source(kind, value)
        flags &= re.IGNORECASE | _TYPES
        key = source, flags
        if key not in self._tests:
            if flags & re.IGNORECASE and kind == "IN":
                self._spend(_CASES)
            self._tests[key] = re.compile(source, flags).fullmatch
        return self._tests[key]

    def _run(self, code: _Code, text: str, start: int, *, whole: bool, looks: dict[tuple[int, int], bool]) -> bool:
        seen, stack = set[tuple[int, int]](), [(0, start)]
        while stack:
            state = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            self._spend(1)
            at, place = state
            if at == len(code):
                if place == len(text) or not whole:
                    return True
                continue
            step = code[at]
            if isinstance(step, _Jump):
                stack += [(to, place) for to in step.to]
            elif isinstance(step, _Letter):
                if place < len(text) and step.test(text[place]):
                    stack.append((at + 1, place + 1))
            elif self._holds(step, text, place, looks):
                stack.append((at + 1, place))
        return False

    def _holds(self, step: _Place | _Look, text: str, place: int, looks: dict[tuple[int, int], bool]) -> bool:
        if isinstance(step, _Place):
            return _is_at(step, text, place)
        start = place - (step.behind or 0)
        key = id(step.program), start
        if key not in looks:
            looks[key] = start >= 0 and self._run(step.program, text, start, whole=False, looks=looks)
        return looks[key] == step.wanted


def _is_at(step: _Place, text: str, place: int) -> bool:
    if step.kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return place == 0
    if step.kind in ("AT_END", "AT_END_STRING"):
        return place == len(text)
    before, after = (bool(step.word(text[i])) if 0 <= i < len(text) else False for i in (place - 1, place))
    if step.kind == "AT_BOUNDARY":
        return before != after
    return before == after and (bool(text) or _EMPTY_IS_NO_BOUNDARY)


def _source(kind: str, value: Any) -> str:
    """One character of a pattern in the syntax of `re`."""
    if kind == "LITERAL":
        return _letter(value)
    if kind == "NOT_LITERAL":
        return f"[^{_letter(value)}]"
    if kind == "ANY":
        return r"[^\n]"
    negated = str(value[0][0]) == "NEGATE"
    return f"[{'^' if negated else ''}{''.join(_member(str(k), v) for k, v in value[negated:])}]"


def _member(kind: str, value: Any) -> str:
    if kind == "LITERAL":
        return _letter(value)
    if kind == "RANGE":
        return f"{_letter(value[0])}-{_letter(value[1])}"
    name = str(value).removeprefix("CATEGORY_")
    letter = name.removeprefix("NOT_")[0].lower()
    return "\\" + (letter.upper() if name.startswith("NOT_") else letter)


def _letter(code: int) -> str:
    return f"\\U{code:08x}"

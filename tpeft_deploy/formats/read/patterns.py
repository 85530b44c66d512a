"""Regular expressions of adapter_config.json, matched as PEFT matches them, in time that no pattern makes long.

PEFT asks Python's `re`, which some patterns of twenty letters keep busy for ever.  The answers here are the same:

    names                         of letters, digits and dots are looked up, however many there are
    most expressions              RE2, in time linear in the name; rewritten from `re`'s parse, as its syntax differs
    lookarounds, flags, Unicode   `linear_match`, which visits each state once for each letter
    backreferences and the like   refused: no engine that is always fast has them

All the patterns of a field share one budget of work.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from re import _parser  # what reads patterns; it has no public name
from typing import Any, NoReturn

from tpeft_deploy.errors import FormatError, brief
from tpeft_deploy.formats.base.linear_match import NotRegular, Program, ProgramTooLarge

__all__ = ["Endings", "Patterns"]

_LONGEST = 32_768  # letters of a pattern
_WORK = 1_000_000_000  # steps of at most 10 ns; a thousand names with a hundred expressions take half of it
_PATTERN, _LETTER = 50_000, 150  # steps for a pattern and for each of its letters, until it is compiled
_CALL, _STEP = 500, 40  # steps for a call of RE2, and for one of `linear_match`
_MEMORY = 2**20  # bytes for one expression in RE2
_PLAIN = re.compile(r"(\^?)((?:[A-Za-z0-9_\-.]|\\[.\-])*)\$?")
_ANY = "\n"  # stands for the dot of a pattern, as no name has one
_ASCII = {
    "DIGIT": "0-9",
    "NOT_DIGIT": r"\x00-/:-\x7f",
    "SPACE": r"\t-\r\x1c-\x20",
    "NOT_SPACE": r"\x00-\x08\x0e-\x1b!-\x7f",
    "WORD": "0-9A-Z_a-z",
    "NOT_WORD": r"\x00-/:-@\[-\^`{-\x7f",
}
_PLACES = {
    "AT_BEGINNING": r"\A",
    "AT_BEGINNING_STRING": r"\A",
    "AT_END": r"\z",
    "AT_END_STRING": r"\z",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
}
_FLAGS = re.UNICODE | re.MULTILINE | re.DOTALL | re.VERBOSE  # which mean nothing for names of one line in ASCII


class Patterns:
    """The patterns of one field of a configuration.

    Args:
        patterns: regular expressions, in the configuration's order.
        whole: whether one must match a whole name, as `re.fullmatch` has it; else the end of a name from a dot on, as
            `get_pattern_key` of PEFT has it.
        field: name of the field, for messages.
        source: path of the configuration, for messages.

    `work` counts the steps taken so far.
    """

    def __init__(self, patterns: Sequence[str], *, whole: bool, field: str, source: str) -> None:
        self._patterns, self._whole = patterns, whole
        self._field, self._source = field, source
        self.work = 0
        # A plain pattern's dots stand for any letter: names are looked up without the letters in the places of dots.
        self._dots: dict[int, dict[tuple[int, ...], None]] = defaultdict(dict)  # length -> places of dots
        self._names: dict[tuple[bool, str], int] = {}  # anchored, and the pattern with _ANY for dots -> the first of it
        self._others: list[int] = []
        self._compiled: dict[int, Callable[[str], bool]] = {}
        for index, pattern in enumerate(patterns):
            plain = None if whole else _PLAIN.fullmatch(pattern)
            if plain is None:
                self._others.append(index)
                continue
            text = re.sub(r"\\(.)|\.", lambda found: found[1] or _ANY, plain[2])
            self._dots[len(text)].setdefault(tuple(place for place, own in enumerate(text) if own == _ANY))
            self._names.setdefault((bool(plain[1]), text), index)

    def first(self, name: str) -> str | None:
        """The first pattern that matches a name; None where none does.

        Raises:
            FormatError: a pattern is no regular expression, or one that cannot be matched in linear time; the name has
                a line break; or the patterns and names are so many that matching them would take too long.
        """
        if not self._patterns:
            return None
        if "\n" in name:
            raise FormatError(f"read {self._source}, module {name!r}", problem="its name has a line break")
        found = self._plain(name)
        for index in self._others:
            if found is not None and index > found:
                break
            if self._match(index, name):
                return self._patterns[index]
        return None if found is None else self._patterns[found]

    def _plain(self, name: str) -> int | None:
        found: list[int] = []
        start = 0
        while True:
            for dots in self._dots.get(len(name) - start, ()):
                self._spend(100 + len(name) // 10 + 20 * len(dots))
                letters = _without(name[start:], dots)
                keys = [(False, letters), (True, letters)][: 1 + (start == 0)]
                found += [self._names[key] for key in keys if key in self._names]
            start = name.find(".", start) + 1
            if start == 0:
                return min(found, default=None)

    def _match(self, index: int, name: str) -> bool:
        if index not in self._compiled:
            pattern = self._patterns[index]
            if len(pattern) > _LONGEST:
                self._refuse(pattern, f"patterns of at most {_LONGEST} letters", f"one of {len(pattern)}")
            self._spend(_PATTERN + _LETTER * len(pattern) + len(pattern) ** 2 // 50)
            try:
                self._compiled[index] = self._compile(pattern)
            except NotRegular as error:
                self._refuse(pattern, "patterns that can be matched in linear time", str(error))
            except (ProgramTooLarge, RecursionError) as error:
                self._refuse(pattern, "patterns that are small once their repeats are written out", brief(error))
            except (re.error, OverflowError, ValueError) as error:
                self._refuse(pattern, "regular expressions", str(error))
        return self._compiled[index](name)

    def _compile(self, pattern: str) -> Callable[[str], bool]:
        text = pattern if self._whole else rf"(.*\.)?({pattern})$"
        tree = _parser.parse(text)
        flags = tree.state.flags | re.UNICODE

        @cache
        def slow() -> Program:
            return Program(tree, flags, whole=self._whole, spend=lambda steps: self._spend(_STEP * steps))

        try:
            fast = _re2(_rewritten(tree, flags))
        except _Beyond:
            return slow().matches
        ways = _ways(pattern)
        call = fast.fullmatch if self._whole else fast.match

        def matches(name: str) -> bool:
            if not name or not name.isascii():
                return slow().matches(name)
            states = fast.programsize if ways is None else min(fast.programsize, ways * (1 + name.count(".")))
            self._spend(_CALL + states * len(name))
            return call(name.encode()) is not None

        return matches

    def _spend(self, steps: int) -> None:
        self.work += steps
        if self.work > _WORK:
            raise FormatError(
                f"read {self._source}, {self._field} of its configuration",
                expected=f"patterns that {_WORK:,} steps match with all names",
                got=f"{len(self._patterns)} that take more",
                fix="Write fewer or shorter patterns, or plain names of modules, of which any number is quick.",
            )

    def _refuse(self, pattern: str, expected: str, got: str) -> NoReturn:
        raise FormatError(
            f"read {self._source}, {self._field} of its configuration",
            expected=expected,
            got=f"{brief(repr(pattern), 100)} ({got})",
            fix="Write it without backreferences, atomic groups and large repeats, or as names: q_proj|v_proj.",
        )


class Endings:
    """Endings of names, looked up in time that does not grow with their number."""

    def __init__(self, endings: Iterable[str]) -> None:
        self._by_length: dict[int, set[str]] = defaultdict(set)
        for ending in endings:
            self._by_length[len(ending)].add(ending)

    def end(self, name: str) -> bool:
        """Whether a name ends with one of them, as `name.endswith(tuple(endings))` has it."""
        lengths = (length for length in self._by_length if length <= len(name))
        return any(name[len(name) - length :] in self._by_length[length] for length in lengths)

    def end_module(self, name: str) -> bool:
        """Whether one of them is the name, or its end behind a dot."""
        start = 0
        while name[start:] not in self._by_length.get(len(name) - start, ()):
            start = name.find(".", start) + 1
            if start == 0:
                return False
        return True


def _without(text: str, places: Iterable[int]) -> str:
    """A text with _ANY in some places."""
    parts, start = [], 0
    for place in places:
        parts.append(text[start:place])
        start = place + 1
    return _ANY.join([*parts, text[start:]])


class _Beyond(Exception):
    """Raised for what RE2 does not express, or expresses differently."""


def _re2(text: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors, options.never_capture, options.dot_nl, options.max_mem = False, True, True, _MEMORY
    try:
        return re2.compile(text.encode(), options)
    except re2.error as error:
        raise _Beyond from error
    finally:
        re2.purge()  # it would keep the memory of the last 128


def _ways(pattern: str) -> int | None:
    """In how many places of a pattern a match that began at one letter may be at a time; None where it has a loop."""
    try:
        return 1 + _more_ways(_parser.parse(pattern))
    except (re.error, _Loop):
        return None


class _Loop(Exception):
    """Raised for a pattern that may go round."""


def _more_ways(tree: Any) -> int:
    more = 0
    for operator, value in tree:
        kind = str(operator)
        if kind == "BRANCH":
            more += len(value[1]) - 1 + sum(map(_more_ways, value[1]))
        elif kind == "SUBPATTERN":
            more += _more_ways(value[3])
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            if value[1] > 1:
                raise _Loop
            more += 1 + _more_ways(value[2])
    return more


def _rewritten(tree: Any, flags: int) -> str:
    """A parsed pattern in RE2's syntax, equal to it on names of one line in ASCII."""
    if flags & ~_FLAGS:
        raise _Beyond
    return "".join(_node(str(kind), value, flags) for kind, value in tree)


def _node(kind: str, value: Any, flags: int) -> str:
    if kind == "LITERAL":
        return _letter(value)
    if kind == "NOT_LITERAL":
        return f"[^{_letter(value)}]"
    if kind == "ANY":
        return "."
    if kind == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return f"[{'^' if negated else ''}{''.join(_member(str(k), v) for k, v in value[negated:])}]"
    if kind == "AT":
        return _PLACES[str(value)]
    if kind == "BRANCH":
        return f"(?:{'|'.join(_rewritten(branch, flags) for branch in value[1])})"
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, body = value
        upper = "" if most == _parser.MAXREPEAT else int(most)
        return f"(?:{_rewritten(body, flags)}){{{int(least)},{upper}}}"
    if kind == "SUBPATTERN":
        _, added, removed, body = value
        return f"(?:{_rewritten(body, (flags | added) & ~removed)})"
    raise _Beyond


def _member(kind: str, value: Any) -> str:
    if kind == "LITERAL":
        return _letter(value)
    if kind == "RANGE":
        return f"{_letter(value[0])}-{_letter(value[1])}"
    return _ASCII[str(value).removeprefix("CATEGORY_")]


def _letter(code: int) -> str:
    if code > 0x7F:
        raise _Beyond
    return rf"\x{{{code:x}}}"

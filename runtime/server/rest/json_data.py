"""Parsing of JSON that is too large for one step: tensor data is cut out and converted in pieces.

The JSON parser holds the GIL, and makes an object of each number.  So the `data` of tensors is split at commas, and the
remaining JSON must be as small as that of any other request.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.v2.offload import PIECE, breathe
from tpeft_deploy.tucker import Array

__all__ = ["Block", "Cut", "SMALL", "cut", "cut_strings"]

SMALL = 1 << 18
"""Maximum bytes of JSON parsed in one step; in larger JSON, maximum bytes besides tensor data."""
_OPENS = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_MISPLACED = re.compile(rb"[0-9a-zA-Z][ \t\r\n]*\[|\][ \t\r\n]*[-0-9a-zA-Z]")
_OTHERS = bytes(set(range(256)) - set(b"[],"))
_FLATTEN = bytes.maketrans(b"[]", b"  ")
_NONCE = secrets.token_hex(8)  # keeps client strings from matching a placeholder


@dataclass(frozen=True)
class Block:
    """A list of numbers in a text.

    Attributes:
        text: the whole text.
        start: index of the opening bracket.
        stop: index after the closing bracket.
    """

    text: bytes | bytearray
    start: int
    stop: int

    def flat(
        self, doing: str, shape: Sequence[int], count: int, dtype: Any, convert: Callable[[list[Any]], Array]
    ) -> Array:
        """Return the elements of a flat list, or of lists nested according to the shape, as an array.

        Args:
            doing: operation named in error messages.
            shape: shape of the tensor.
            count: number of elements.
            dtype: NumPy dtype of the array.
            convert: converts a list of elements to an array; raises for invalid elements.

        Raises:
            ProtocolError: the elements do not match the shape or the datatype.
        """
        wrong = ProtocolError(
            f"{doing}: data", expected=f"{count} elements, in one list or nested as {list(shape)}", got="others"
        )
        if not 0 < count <= self.stop - self.start:
            raise wrong
        expected = None
        if self.text.find(b"[", self.start + 1, self.stop) >= 0:
            if _nested_size(shape) > self.stop - self.start:
                raise wrong
            expected = _nested(shape)
        elif self.text.find(b"]", self.start + 1, self.stop - 1) >= 0:
            raise wrong
        found = np.empty(count, dtype)
        filled, seen = 0, 1
        for piece, comma in self._pieces(wrong):
            if expected is not None:
                marks = piece.translate(None, _OTHERS) + comma
                if expected[seen : seen + len(marks)] != marks or _MISPLACED.search(piece):
                    raise wrong
                seen += len(marks)
            part = convert(_values(piece, wrong))
            if not len(part) or filled + len(part) > count:
                raise wrong
            found[filled : filled + len(part)] = part
            filled += len(part)
            breathe()
        if filled != count or (expected is not None and seen + 1 != len(expected)):
            raise wrong
        return found

    def _pieces(self, wrong: ProtocolError) -> Iterator[tuple[bytes, bytes]]:
        at, last = self.start + 1, self.stop - 1
        while True:
            end = self.text.find(b",", at + PIECE, last) if last - at > PIECE else -1
            end = last if end < 0 else end
            if end - at > 2 * PIECE:
                raise wrong
            yield bytes(self.text[at:end]), b"," if end < last else b""
            if end == last:
                return
            at = end + 1


@dataclass(frozen=True)
class Cut:
    """JSON without its large lists of numbers.

    Attributes:
        head: remaining JSON, with a placeholder string for each list.
        blocks: placeholder -> list.
    """

    head: bytes
    blocks: dict[bytes, Block]


def cut(doing: str, text: bytes | bytearray) -> Cut:
    """Cut the large lists of numbers out of a request's JSON; malformed JSON is left to the parser.

    Raises:
        TooLarge: the remaining JSON is larger than `SMALL`.
    """
    head = bytearray()
    blocks: dict[bytes, Block] = {}
    at = after = 0
    while (quote := text.find(b'"', after)) >= 0:
        after = _string_end(text, quote, SMALL)
        if after < 0 or len(head) + after - at > SMALL:
            break
        opens = _OPENS.match(text, quote)
        if opens is None or (stop := _list_end(text, opens.end())) - opens.end() <= PIECE:
            continue
        place = b'"%b %d"' % (_NONCE.encode(), len(blocks))
        head += text[at : opens.end()] + place
        blocks[place] = Block(text, opens.end(), stop)
        at = after = stop
    if len(head) + len(text) - at > SMALL:
        raise TooLarge(
            doing,
            expected=f"at most {SMALL:,} bytes of JSON beside the numbers of tensors",
            got="more",
            fix="Send tensors as raw bytes, with binary_data_size.",
        )
    return Cut(bytes(head + text[at:]), blocks)


def cut_strings(doing: str, text: bytes | bytearray) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Cut large strings out of JSON.

    Returns:
        The remaining JSON with a placeholder for each string, and placeholder -> start and end of the string.

    Raises:
        TooLarge: the remaining JSON is larger than `SMALL`.
    """
    head = bytearray()
    found: dict[str, tuple[int, int]] = {}
    at = after = 0
    while (quote := text.find(b'"', after)) >= 0:
        after = _string_end(text, quote, len(text))
        if after - quote > PIECE:
            place = f"{_NONCE} {len(found)}"
            head += text[at:quote] + b'"%b"' % place.encode()
            found[place] = (quote + 1, after - 1)
            at = after
        if after < 0 or len(head) + after - at > SMALL:
            break
    if len(head) + len(text) - at > SMALL:
        raise TooLarge(doing, expected=f"at most {SMALL:,} bytes of JSON beside its files", got="more")
    return bytes(head + text[at:]), found


def _string_end(text: bytes | bytearray, quote: int, longest: int) -> int:
    at, end = quote + 1, quote + longest + 2
    while (at := text.find(b'"', at, end)) >= 0:
        before = at
        while text[before - 1] == 0x5C:  # a backslash
            before -= 1
        if (at - before) % 2 == 0:
            return at + 1
        at += 1
    return -1


def _list_end(text: bytes | bytearray, start: int) -> int:
    # Numbers contain neither braces nor quotes, and valid JSON has one of them after the list.
    brace = text.find(b"}", start)
    if brace < 0:
        return start
    quote = text.find(b'"', start, brace)
    return text.rfind(b"]", start, brace if quote < 0 else quote) + 1


def _values(piece: bytes, wrong: ProtocolError) -> list[Any]:
    try:
        found: list[Any] = msgspec.json.decode(b"[%b]" % piece.translate(_FLATTEN), type=list)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise wrong from None
    return found


def _nested_size(shape: Sequence[int]) -> int:
    size = 0
    for length in reversed(shape):
        size = length * (size + 1) + 1
    return size


def _nested(shape: Sequence[int]) -> bytes:
    """Return the brackets and commas of lists nested according to a shape."""
    marks = b""
    for length in reversed(shape):
        marks = b"[%b]" % ((marks + b",") * length)[:-1]
    return marks

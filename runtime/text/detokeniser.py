"""Incremental decoding: the text that each token of a sequence settles, which no later token changes.

The texts of a sequence, joined, are what the tokenizer decodes all of its tokens to, without special tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tpeft_deploy.runtime.generation.handle import Detokeniser

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MakeDetokeniser", "clean", "detokenisers", "token_bytes"]

Style = Literal["bytes", "pieces", "whole"]


class MakeDetokeniser(Protocol):
    """Factory of detokenisers; see `detokenisers`."""

    def __call__(self, before: Sequence[int] = (), shown: Sequence[str] = ()) -> Detokeniser:
        """Return the detokeniser of one sequence."""


_BYTE = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # tokens that a ByteFallback decoder takes for bytes
_PER_TOKEN = {"Replace", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder"}
_CONTRACTIONS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def detokenisers(tokenizer: Tokenizer, *, clean_up: bool = False) -> MakeDetokeniser:
    """Make a factory of detokenisers for a tokenizer.

    Args:
        tokenizer: tokenizer.
        clean_up: whether spaces before punctuation are removed, as `clean_up_tokenization` of transformers does.

    Returns:
        Function that makes the detokeniser of one sequence.  It takes the tokens before the sequence; given any, the
        text continues theirs, with the space between, and otherwise it is the text of the sequence alone.  It also
        takes the names of special tokens that the text shows.
    """
    special = frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)
    decode: Callable[[list[int]], str] = partial(tokenizer.decode, skip_special_tokens=True)
    style = _style(json.loads(tokenizer.to_str())["decoder"])

    @cache
    def piece(token: int) -> str | None:
        return None if token in special else tokenizer.id_to_token(token)

    def make(before: Sequence[int] = (), shown: Sequence[str] = ()) -> Detokeniser:
        made: Detokeniser
        if style == "bytes":
            made = _Bytes(piece)
        elif style == "pieces":
            made = _Pieces(piece, decode, before)
        else:
            made = _Whole(decode, before)
        made = _CleanUp(made) if clean_up else made
        names = {token: name for name in shown if (token := tokenizer.token_to_id(name)) in special}
        return _Shown(made, names) if names else made

    return make


def token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Return a function for the bytes of one token's text as it continues a text; a special token gives its name.

    Args:
        tokenizer: tokenizer.
    """
    special = frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)
    style = _style(json.loads(tokenizer.to_str())["decoder"])

    @cache
    def of(token: int) -> bytes:
        piece = tokenizer.id_to_token(token) or ""
        if token in special:
            return piece.encode()
        if style == "bytes":
            return _bytes_of(piece)
        if _BYTE.fullmatch(piece):
            return bytes([int(piece[3:-1], 16)])
        # Behind another token, as decoders strip the space at the beginning of a text.
        before = tokenizer.decode([token], skip_special_tokens=False)
        return tokenizer.decode([token, token], skip_special_tokens=False)[len(before) :].encode()

    return of


def _style(decoder: dict[str, Any] | None) -> Style:
    """How the text of a sequence depends on its tokens.

    "bytes": the bytes of each token, joined.  "pieces": the text of each token, where only the first token of all and
    runs of byte tokens differ.  "whole": any other way.
    """
    parts = _flat(decoder)
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return "bytes"
    if kinds and kinds[-1] == "Strip" and parts[-1]["start"] <= 1 and not parts[-1]["stop"]:
        kinds.pop()
    if kinds and kinds[-1] == "Fuse":
        kinds.pop()
    return "pieces" if set(kinds) <= _PER_TOKEN else "whole"


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flat(inner)]
    return [decoder]


class _Bytes:
    """Detokeniser of byte-level tokenizers: a character is settled with its last byte."""

    def __init__(self, piece: Callable[[int], str | None]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_bytes_of(self._piece(token)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


@cache
def _byte_of_character() -> dict[str, int]:
    """Character that stands for each byte in the tokens of byte-level tokenizers."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _bytes_of(piece: str | None) -> bytes:
    known = _byte_of_character()
    if piece is None:
        return b""
    # A token that was added, with a character that stands for no byte, is text as it is.
    return bytes(known[c] for c in piece) if all(c in known for c in piece) else piece.encode()


class _Pieces:
    """Detokeniser of tokenizers with a text for each token: the token before tells that a token is not the first.

    The text of a run of byte tokens depends on all of them (one wrong byte spoils the others), so that it is settled
    with the end of the run.
    """

    def __init__(
        self, piece: Callable[[int], str | None], decode: Callable[[list[int]], str], before: Sequence[int]
    ) -> None:
        self._piece, self._decode = piece, decode
        self._held: list[int] = []
        self._before = next(([token] for token in reversed(before) if piece(token) is not None), [])

    def push(self, token: int) -> str:
        piece = self._piece(token)
        if piece is None:
            return ""
        if _BYTE.fullmatch(piece):
            self._held.append(token)
            return ""
        return self.flush() + self._settle([token])

    def flush(self) -> str:
        held, self._held = self._held, []
        return self._settle(held) if held else ""

    def _settle(self, tokens: list[int]) -> str:
        start = len(self._decode(self._before)) if self._before else 0
        text = self._decode(self._before + tokens)[start:]
        self._before = tokens[-1:]
        return text


class _Whole:
    """Detokeniser of any other tokenizer: nothing is settled before the end."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int]) -> None:
        self._decode, self._before = decode, list(before)
        self._tokens: list[int] = []

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def flush(self) -> str:
        start = len(self._decode(self._before)) if self._before else 0
        self._before, self._tokens = self._before + self._tokens, []
        return self._decode(self._before)[start:]


class _Shown:
    """Shows special tokens in the text of another detokeniser, which leaves them out."""

    def __init__(self, inner: Detokeniser, names: Mapping[int, str]) -> None:
        self._inner, self._names = inner, names

    def push(self, token: int) -> str:
        name = self._names.get(token)
        return self._inner.push(token) if name is None else self._inner.flush() + name

    def flush(self) -> str:
        return self._inner.flush()


class _CleanUp:
    """Removes spaces before punctuation from the text of another detokeniser: text from a space on is held back."""

    def __init__(self, inner: Detokeniser) -> None:
        self._inner = inner
        self._held = ""

    def push(self, token: int) -> str:
        self._held += self._inner.push(token)
        end = len(self._held)
        while (end := self._held.rfind(" ", 0, end)) > 0 and self._held[:end].endswith(" '"):
            pass  # " ' " is one of the texts that change
        end = max(end, 0)
        text, self._held = self._held[:end], self._held[end:]
        return clean(text)

    def flush(self) -> str:
        text, self._held = self._held + self._inner.flush(), ""
        return clean(text)


def clean(text: str) -> str:
    """Remove the spaces before punctuation and contractions, as transformers does."""
    for spaced in _CONTRACTIONS:
        text = text.replace(spaced, spaced.strip())
    return text

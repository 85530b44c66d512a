"""Ports of a causal language model in slot form: the field `decoder` of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Decoder", "decoder_of"]


@dataclass(frozen=True)
class Decoder:
    """Ports of a causal language model in slot form.

    Args:
        tokens: input of new tokens, (rows, chunk).
        lengths: input with the number of tokens in each row's cache before the run, (rows).
        logits: output of each row's last token, (rows, vocabulary).
        caches: for each cache, the input and the output that share memory, (rows, heads, buffer, head size).
        positions: largest number of tokens of a sequence.
        vocabulary: number of tokens.
    """

    tokens: str
    lengths: str
    logits: str
    caches: tuple[tuple[str, str], ...]
    positions: int
    vocabulary: int


def decoder_of(entry: Mapping[str, Any] | None) -> Decoder | None:
    """Parse the entry of a manifest; None for a bundle without one."""
    if entry is None:
        return None
    caches = tuple((str(past), str(present)) for past, present in entry["caches"])
    return Decoder(
        tokens=str(entry["tokens"]),
        lengths=str(entry["lengths"]),
        logits=str(entry["logits"]),
        caches=caches,
        positions=int(entry["positions"]),
        vocabulary=int(entry["vocabulary"]),
    )

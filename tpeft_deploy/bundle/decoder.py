"""Ports of a causal language model in slot form: the field `decoder` of a manifest."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DecoderPorts"]


@dataclass(frozen=True)
class DecoderPorts:
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

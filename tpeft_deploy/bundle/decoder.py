"""Ports of a decoder in slot form: the field `decoder` of a manifest."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DecoderPorts"]


@dataclass(frozen=True)
class DecoderPorts:
    """Ports of a decoder in slot form: of a causal language model, an encoder-decoder, or a model of images and text.

    Args:
        tokens: input of new tokens, (rows, chunk).
        lengths: input with the number of tokens in each row's cache before the run, (rows).
        logits: output of each row's last token, (rows, vocabulary).
        caches: for each cache, the input and the output that share memory, (rows, heads, buffer, head size).
        positions: largest number of tokens of a sequence.
        vocabulary: number of tokens.
        memory: inputs with the caches of cross-attention, read only, key and value of each layer in turn,
            (rows, heads, source, head size). Positions behind a row's length may hold any finite values.
        memory_lengths: input with the number of valid positions of each row's memory, (rows).
        features: input with embeddings, (rows, chunk, width), which replace those of the placeholder tokens.
        placeholder: token that `features` replace.
        source: component that computes memory or features.
        source_outputs: outputs of the source component, in the order of `memory`, or the one with features.
        start: first token of the decoder, which is the default prompt of an encoder-decoder.
        source_positions: largest number of positions of a source; None where the encoder has no limit.
        choice: file of the graph that finds the largest logits of each row, with inputs `logits` (rows, vocabulary) and
            `temperatures` (rows, sums), and outputs `top_logits` and `top_tokens` (rows, kept), and `sums` (rows, sums)
            of exp((logit - largest) / temperature). Empty in bundles of earlier versions.
    """

    tokens: str
    lengths: str
    logits: str
    caches: tuple[tuple[str, str], ...]
    positions: int
    vocabulary: int
    memory: tuple[str, ...] = ()
    memory_lengths: str = ""
    features: str = ""
    placeholder: int | None = None
    source: str = ""
    source_outputs: tuple[str, ...] = ()
    start: int | None = None
    source_positions: int | None = None
    choice: str = ""

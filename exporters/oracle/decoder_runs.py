"""Runs that a decoder's graph in slot form takes: free sizes, and rows with pasts that fit them.

A run is a decode (one token for each row, any pasts), a piece of the prompt of one sequence (one row, any past), or
the first piece of several sequences of one length (past 0): the runs of GroupQueryAttention without `query_seqlens`.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.exporters.oracle.base import Inputs
from tpeft_deploy.tucker import Array

__all__ = ["BUFFER", "CHUNK", "ROWS", "SOURCE", "pasts", "run_sizes", "with_pasts"]

ROWS, CHUNK, BUFFER, SOURCE = "rows", "chunk", "buffer", "source"  # names of the free sizes


def run_sizes(own: dict[str, int]) -> list[dict[str, int]]:
    """Free sizes to run a decoder at, one of each kind, given those of its example: a first piece of several rows."""
    chunk, buffer = own[CHUNK], own[BUFFER]
    memory = [{SOURCE: own[SOURCE] + more} if SOURCE in own else {} for more in range(3)]
    return [
        own | {ROWS: 2} | memory[0],
        own | {ROWS: 5, CHUNK: 1, BUFFER: buffer + 1} | memory[1],
        own | {ROWS: 1, CHUNK: chunk + 1, BUFFER: buffer + 2} | memory[2],
    ]


def pasts(rows: int, chunk: int, buffer: int) -> Array:
    """Tokens in the cache of each row, of the kind of run that these sizes are; several for rows of one token."""
    room = buffer - chunk
    if room < 0 or chunk < 1:
        raise ValueError(f"a cache of {buffer} tokens does not hold {chunk} new ones")
    if chunk > 1 and rows > 1:
        return np.zeros(rows, np.int64)
    return (room - 5 * np.arange(rows, dtype=np.int64)) % (room + 1)


def with_pasts(decoder: DecoderPorts, inputs: Inputs) -> Inputs:
    """Inputs with the lengths of their rows set to pasts that their run allows, and those of memory to others."""
    (rows, chunk), (past, _) = inputs[decoder.tokens].shape[:2], decoder.caches[0]
    lengths = {decoder.lengths: pasts(rows, chunk, inputs[past].shape[2])}
    if decoder.memory:
        source = inputs[decoder.memory[0]].shape[2]
        if source < 1:
            raise ValueError("a memory of no positions has nothing to attend to")
        lengths[decoder.memory_lengths] = source - 2 * np.arange(rows, dtype=np.int64) % source
    return {name: lengths.get(name, array) for name, array in inputs.items()}

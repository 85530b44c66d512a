"""Attention over caches of fixed size in plain operators, for layers that GroupQueryAttention does not compute.

The scores of the whole buffer are computed and masked, so the result is exact at any past.  New keys and values are put
into the cache by one ScatterElements, of which ONNX Runtime copies nothing where past and present are the same memory;
nothing else reads the past.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["attention", "position_bias", "put", "seen_by"]


def put(past: torch.Tensor, new: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A cache with new keys or values in it.

    Args:
        past: (rows, heads, buffer, head size).
        new: (rows, heads, chunk, head size).
        positions: places of the new ones, (rows, chunk).
    """
    return past.scatter(2, positions[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]), new)


def seen_by(positions: torch.Tensor, buffer: int, window: int | None = None) -> torch.Tensor:
    """Mask of causal attention, (rows, chunk, buffer).

    Args:
        positions: positions of the queries, (rows, chunk).
        buffer: tokens that a cache holds.
        window: number of tokens that a token attends to, itself included; None for all.
    """
    places = torch.arange(buffer, device=positions.device)
    seen = places <= positions[..., None]
    return seen if window is None else seen & (places > positions[..., None] - window)


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries to a cache, (rows, chunk, heads, head size).

    Args:
        query: (rows, heads, chunk, head size).
        keys: (rows, heads of the cache, buffer, head size); any finite numbers where nothing is seen.
        values: the same of the values.
        seen: mask, (rows, chunk or 1, buffer).
        scale: factor of the products of queries and keys.
        softcap: limit of tanh on scaled products; 0 for none.
        bias: summand of the scores, (rows, heads, chunk, buffer).
    """
    rows, heads, chunk = query.shape[:3]
    several = heads != keys.shape[1]  # heads of queries to each head of the cache
    scores = (_grouped(query, keys) if several else query) @ keys.transpose(-1, -2)
    if several:
        scores = scores.reshape(rows, heads, chunk, -1)
    scores = scores if scale == 1.0 else scores * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    # The least number in place of -inf: a row that sees nothing gets numbers, which nobody reads, and not NaN.
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(query.dtype)
    attended = (_grouped(weights, keys) if several else weights) @ values
    return attended.reshape(rows, heads, chunk, values.shape[-1]).transpose(1, 2)


def _grouped(tensor: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Join the chunks of all heads that read one head of a cache."""
    return tensor.reshape(tensor.shape[0], cache.shape[1], -1, tensor.shape[-1])


def position_bias(module: Any, positions: torch.Tensor, buffer: int) -> torch.Tensor:
    """Bias of relative positions as T5 learns it, (rows, heads, chunk, buffer).

    Args:
        module: layer with the table.
        positions: positions of the queries, (rows, chunk).
        buffer: tokens that a cache holds.
    """
    relative = torch.arange(buffer, device=positions.device) - positions[..., None]
    buckets = module._relative_position_bucket(
        relative,
        bidirectional=False,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    table: nn.Module = module.relative_attention_bias
    biases: torch.Tensor = table(buckets)
    return biases.permute(0, 3, 1, 2)

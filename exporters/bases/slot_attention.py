"""Attention over a cache of fixed size, which exports as com.microsoft.GroupQueryAttention.

transformers' attention registry gives every layer of a model the function `attend`; the caches of the run travel beside
the model's forward method, in `running`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from tpeft_deploy.errors import UnsupportedBase

__all__ = ["IMPLEMENTATION", "SlotCaches", "attend", "running"]

IMPLEMENTATION = "tpeft_slots"  # name of `attend` in transformers' registry
_MULTIPLE = 8
_CHANGES = {"s_aux", "position_bias", "cu_seq_lens_q", "block_table", "head_mask"}  # arguments that change the result


def group_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    last: torch.Tensor,
    total: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention of new tokens to a cache and to themselves, as com.microsoft.GroupQueryAttention defines it.

    Args:
        query: (rows, chunk, heads * head size).
        key: (rows, chunk, heads of the cache * head size); position encodings are in it already.
        value: the same of the values.
        past_key: (rows, heads of the cache, buffer, head size), filled up to each row's past.
        past_value: the same of the values.
        last: int32 (rows), index of each row's last token after the run.
        total: int32 scalar, at least the largest number of tokens of a row after the run; the chunk if that is it.
        scale: factor of the products of queries and keys.
        softcap: limit of tanh on scaled products; 0 for none.
        window: number of tokens that a token attends to, itself included; -1 for all.

    Returns:
        Attention (rows, chunk, heads * head size), and the cache with the new tokens in it; zeros behind them.
    """
    rows, heads, buffer, size = past_key.shape
    chunk = key.shape[1]
    if int(last.max()) >= min(int(total), buffer):
        raise ValueError(f"a cache of {buffer} tokens does not hold {int(last.max()) + 1}")
    new = (last + 1 - chunk).long()[:, None] + torch.arange(chunk)  # (rows, chunk)
    held = (torch.arange(buffer) < new[:, :1])[:, None, :, None]
    place = new[:, None, :, None].expand(-1, heads, -1, size)
    keys, values = (
        torch.where(held, past, 0.0).scatter(2, place, own.view(rows, chunk, heads, size).transpose(1, 2))
        for past, own in ((past_key, key), (past_value, value))
    )
    groups = query.shape[-1] // (heads * size)
    asked = query.view(rows, chunk, heads, groups, size).permute(0, 2, 3, 1, 4)
    scores = scale * (asked @ keys[:, :, None].transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.arange(buffer) <= new[:, :, None]
    if window >= 0:
        seen &= torch.arange(buffer) > new[:, :, None] - window
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).float().softmax(-1).to(query.dtype)
    attended = (weights @ values[:, :, None]).permute(0, 3, 1, 2, 4)
    return attended.reshape(rows, chunk, -1).contiguous(), keys.contiguous(), values.contiguous()


def _node(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor,
    last: torch.Tensor, total: torch.Tensor, scale: float, softcap: float, window: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The same as a node of the graph that is being exported."""
    heads, size = past_key.shape[1], past_key.shape[3]
    attributes: dict[str, Any] = {
        "num_heads": query.shape[-1] // size,
        "kv_num_heads": heads,
        "scale": scale,
        "softcap": softcap,
        "local_window_size": window,
        "do_rotary": 0,
    }
    results = (query, past_key, past_value)
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (query, key, value, past_key, past_value, last, total),
            attributes,
            dtypes=[tensor.dtype for tensor in results],
            shapes=[tensor.shape for tensor in results],
            version=1,
        )
    )


@dataclass
class SlotCaches:
    """Caches of one run of a model: what each layer holds before, and after once it has run.

    Args:
        past: layer -> keys and values, (rows, heads, buffer, head size) each.
        last: index of each row's last token after the run, int32 (rows).
        total: at least the largest number of tokens of a row after the run, int32 scalar.
        present: layer -> keys and values with the new tokens in them.
    """

    past: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    last: torch.Tensor
    total: torch.Tensor
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    updated: set[int] = field(default_factory=set)


_slots: ContextVar[SlotCaches] = ContextVar("slots")


@contextmanager
def running(slots: SlotCaches) -> Iterator[object]:
    """Give a model's layers their caches; the cache object that comes back is for the model's forward method."""
    token = _slots.set(slots)
    try:
        yield _cache(slots)
    finally:
        _slots.reset(token)


def _cache(slots: SlotCaches) -> object:
    from transformers.cache_utils import Cache

    class NewTokens(Cache):  # type: ignore[misc]  # transformers says Any of what it loads late
        """Cache that hands new keys and values through: `attend` puts them where they belong."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """New keys and values as they are."""
            slots.updated.add(layer_idx)
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Zero: positions are counted from the lengths of the rows."""
            del layer_idx
            return 0

    return NewTokens(layers=[])


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **further: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer as transformers' registry calls it: (rows, heads, chunk, head size) each.

    Raises:
        UnsupportedBase: the operator cannot compute this layer's attention.
    """
    slots, layer = _slots.get(), cast("int", getattr(module, "layer_idx", -1))
    problem = _problem(module, slots, layer, key, value, attention_mask, further)
    if problem:
        raise UnsupportedBase(f"attend in layer {layer} ({type(module).__name__})", problem=problem)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    asked, new_key, new_value = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    past_key, past_value = slots.past[layer]
    window = -1 if sliding_window is None else int(sliding_window)
    compute = _node if torch.onnx.is_in_onnx_export() else group_query_attention
    own = (scale, float(softcap or 0.0), window)
    output, present_key, present_value = compute(
        asked, new_key, new_value, past_key, past_value, slots.last, slots.total, *own
    )
    slots.present[layer] = (present_key, present_value)
    rows, heads, chunk, size = query.shape
    return output.view(rows, chunk, heads, size), None


def _problem(
    module: nn.Module,
    slots: SlotCaches,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    further: Mapping[str, Any],
) -> str:
    if layer not in slots.updated or layer in slots.present:
        return "it reads keys and values of another layer, and a layer has one cache"
    if key.shape[-1] % _MULTIPLE:
        return f"the size of a head, {key.shape[-1]}, is no multiple of {_MULTIPLE}, as GroupQueryAttention asks"
    if key.shape[-1] != value.shape[-1]:
        return f"keys of size {key.shape[-1]} and values of size {value.shape[-1]} differ"
    if mask is not None or getattr(module, "is_causal", True) is False or further.get("is_causal") is False:
        return "its mask is another than the causal one"
    given = sorted(name for name in _CHANGES if further.get(name) is not None)
    return f"GroupQueryAttention has no {given[0]}" if given else ""

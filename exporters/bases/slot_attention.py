"""Attention over a cache of fixed size, which exports as com.microsoft.GroupQueryAttention, or in plain operators.

transformers' attention registry gives every layer of a model the function `attend`; the caches of the run travel beside
the model's forward method, in `running`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.generation.plain_attention import attention, position_bias, put, seen_by

__all__ = ["IMPLEMENTATION", "SlotCaches", "attend", "running"]

IMPLEMENTATION = "tpeft_slots"  # name of `attend` in transformers' registry
_MULTIPLE = 8
_BIAS, _TABLE = "position_bias", "has_relative_attention_bias"
_CHANGES = {"s_aux", "cu_seq_lens_q", "block_table", "head_mask"}  # arguments that change the result

_Pair = tuple[torch.Tensor, torch.Tensor]
_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    keys, values = (
        put(torch.where(held, past, 0.0), own.view(rows, chunk, heads, size).transpose(1, 2), new)
        for past, own in ((past_key, key), (past_value, value))
    )
    asked = query.view(rows, chunk, -1, size).transpose(1, 2)
    seen = seen_by(new, buffer, None if window < 0 else window)
    attended = attention(asked, keys, values, seen, scale=scale, softcap=softcap)
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
        positions: positions of the new tokens, (rows, chunk).
        total: at least the largest number of tokens of a row after the run, int32 scalar.
        memory: layer -> keys and values of cross-attention, (rows, heads, source, head size) each.
        memory_lengths: valid positions of each row's memory, (rows).
        present: layer -> keys and values with the new tokens in them.
        bias: bias of relative positions, which a model's layers share.
        last: index of each row's last token after the run, int32 (rows).
    """

    past: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    positions: torch.Tensor
    total: torch.Tensor
    memory: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    memory_lengths: torch.Tensor | None = None
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    updated: set[int] = field(default_factory=set)
    bias: torch.Tensor | None = None
    last: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.positions[:, -1].to(torch.int32)


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
    from transformers.cache_utils import Cache, EncoderDecoderCache

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

    tokens = NewTokens(layers=[])
    if not slots.memory:
        return tokens
    layers: list[Any] = [SimpleNamespace(keys=keys, values=values) for keys, values in slots.memory.values()]
    both = EncoderDecoderCache(tokens, NewTokens(layers=layers))
    both.is_updated = dict.fromkeys(slots.memory, True)
    return both


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
        UnsupportedBase: no attention over caches computes this layer's.
    """
    slots, layer = _slots.get(), cast("int", getattr(module, "layer_idx", -1))
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if layer in slots.memory and key is slots.memory[layer][0]:
        return _attend_to_memory(slots, query, key, value, scale), None
    problem = _problem(module, slots, layer, attention_mask, further)
    if problem:
        raise UnsupportedBase(f"attend in layer {layer} ({type(module).__name__})", problem=problem)
    plain = further.get(_BIAS) is not None or key.shape[-1] % _MULTIPLE or key.shape[-1] != value.shape[-1]
    compute = _attend_plainly if plain else _attend_grouped
    options = (scale, float(softcap or 0.0), None if sliding_window is None else int(sliding_window))
    output, slots.present[layer] = compute(module, slots, (query, key, value), slots.past[layer], *options)
    return output, None


def _attend_to_memory(
    slots: SlotCaches, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    seen = torch.arange(key.shape[2], device=key.device) < cast("torch.Tensor", slots.memory_lengths)[:, None]
    return attention(query, key, value, seen[:, None], scale=scale)


def _attend_plainly(
    module: nn.Module, slots: SlotCaches, new: _Three, past: _Pair, scale: float, softcap: float, window: int | None
) -> tuple[torch.Tensor, _Pair]:
    query, key, value = new
    positions, buffer = slots.positions, past[0].shape[2]
    if getattr(module, _TABLE, False):
        slots.bias = position_bias(module, positions, buffer)
    keys, values = put(past[0], key, positions), put(past[1], value, positions)
    seen = seen_by(positions, buffer, window)
    output = attention(query, keys, values, seen, scale=scale, softcap=softcap, bias=slots.bias)
    return output, (keys, values)


def _attend_grouped(
    module: nn.Module, slots: SlotCaches, new: _Three, past: _Pair, scale: float, softcap: float, window: int | None
) -> tuple[torch.Tensor, _Pair]:
    del module
    rows, heads, chunk, size = new[0].shape
    compute = _node if torch.onnx.is_in_onnx_export() else group_query_attention
    query, key, value = (tensor.transpose(1, 2).flatten(2) for tensor in new)
    output, keys, values = compute(
        query, key, value, *past, slots.last, slots.total, scale, softcap, -1 if window is None else window
    )
    return output.view(rows, chunk, heads, size), (keys, values)


def _problem(
    module: nn.Module, slots: SlotCaches, layer: int, mask: torch.Tensor | None, further: Mapping[str, Any]
) -> str:
    if layer not in slots.updated or layer in slots.present:
        return "it reads keys and values of another layer, and a layer has one cache"
    if mask is not None or getattr(module, "is_causal", True) is False or further.get("is_causal") is False:
        return "its mask is another than the causal one"
    if further.get(_BIAS) is not None and slots.bias is None and not getattr(module, _TABLE, False):
        return "its position bias is of no kind known"
    given = sorted(name for name in _CHANGES if further.get(name) is not None)
    return f"attention over caches has no {given[0]}" if given else ""

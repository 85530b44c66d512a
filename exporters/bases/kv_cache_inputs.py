"""Causal language models of transformers as functions of tensors: past keys and values go in, present ones come out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn

__all__ = ["CachedDecoder", "cache_parameter", "with_cache"]

PAST = "past_key_values"
_CACHES = ("cache", PAST)  # as transformers calls it from 5.24 on, and before


def cache_parameter(forward: Callable[..., object]) -> str | None:
    """The parameter of a model's forward method that takes a cache of keys and values, or None."""
    own = inspect.signature(forward).parameters
    return next((name for name in _CACHES if name in own), None)


class CachedDecoder(nn.Module):
    """Mixin that `with_cache` puts before a model's class: a forward method that takes and returns plain tensors.

    Being a subclass and not a wrapper, it leaves every weight the name that adapters know it by.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Mapping[str, torch.Tensor] | None = None,
        **flat: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Logits of the new tokens, and the cache with these tokens in it.

        Positions are counted from the first token that the mask does not hide, so rows may be padded on the left.

        Args:
            input_ids: the new tokens, (batch, sequence).
            attention_mask: 1 or 0 for the past and then the new tokens, (batch, past + sequence).
            past_key_values: "<layer>.key" and "<layer>.value", each (batch, heads, past, size of a head).
            flat: the same as "past_key_values.<layer>.key" and so on.

        Returns:
            `logits` (batch, sequence, vocabulary), `present.<layer>.key` and `present.<layer>.value`, each
            (batch, heads, past + sequence, size of a head).
        """
        from transformers import DynamicCache

        past = past_key_values or {name.removeprefix(f"{PAST}."): tensor for name, tensor in flat.items()}
        layers = [(past[f"{layer}.key"], past[f"{layer}.value"]) for layer in range(len(past) // 2)]
        # Without the config layers of sliding windows keep all tokens too: the mask hides what they do not see.
        cache = DynamicCache(layers)
        own = inspect.signature(super().forward).parameters
        further: dict[str, object] = {str(cache_parameter(super().forward)): cache}
        if "position_ids" in own:
            counted = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            further["position_ids"] = counted[:, -input_ids.shape[1] :]
        outputs = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, return_dict=True, **further
        )
        present = {"logits": outputs.logits}
        for index, layer in enumerate(cache.layers):
            present[f"present.{index}.key"] = layer.keys
            present[f"present.{index}.value"] = layer.values
        return present


def with_cache(model: nn.Module, ids: torch.Tensor, past: int) -> dict[str, torch.Tensor]:
    """Give a causal language model the forward method of `CachedDecoder`, in place.

    Args:
        model: a transformers model with a cache parameter in its forward method (`cache_parameter`).
        ids: tokens to make example inputs of, (batch, past + sequence).
        past: how many of them are in the cache already, at least 1.

    Returns:
        Example inputs by name: the keys and values are the model's own for the first `past` tokens.

    Raises:
        ValueError: the model leaves the cache empty.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :past], use_cache=True, **{str(cache_parameter(model.forward)): cache})
    if not cache.layers:
        raise ValueError("it ran without filling one")
    own = type(model)
    model.__class__ = type(own.__name__, (CachedDecoder, own), {"__module__": own.__module__})
    inputs = {"input_ids": ids[:, past:], "attention_mask": torch.ones_like(ids)}
    for index, layer in enumerate(cache.layers):
        inputs[f"{PAST}.{index}.key"] = layer.keys
        inputs[f"{PAST}.{index}.value"] = layer.values
    return inputs

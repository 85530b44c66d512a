"""Causal language models of transformers in slot form: caches of fixed size, and the length of each row's past."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.kv_cache_inputs import PAST, cache_parameter
from tpeft_deploy.exporters.bases.slot_attention import IMPLEMENTATION, SlotCaches, attend, running
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.causes import said_by
from tpeft_deploy.exporters.oracle.decoder_runs import BUFFER, CHUNK, ROWS

__all__ = [
    "SlotDecoder",
    "SlotSizes",
    "attending",
    "comparing",
    "decoder_base",
    "mixed_in",
    "past_of",
    "slot_caches",
    "slot_inputs",
    "slot_ports",
    "slot_sizes",
    "total_length",
]

_EXAMPLE = (
    2,
    3,
    8,
)  # rows, chunk and buffer: all different and none of them 1, which the exporter takes for a constant
_LENGTHS = (7, 5, 6)  # of the sequences that the slot form is compared with the model's forward method on
_FIX = "Export it without generation=True (--generation)."
_LIMIT = 1e-4  # relative error of the slot form in torch, in the model's dtype or float32


class SlotDecoder(nn.Module):
    """Mixin that `decoder_base` puts before a model's class: a forward method over caches of fixed size.

    Being a subclass and not a wrapper, it leaves every weight the name that adapters know it by.
    """

    def forward(
        self, input_ids: torch.Tensor, seqlens: torch.Tensor, past_key_values: Mapping[str, torch.Tensor] | None = None,
        **flat: torch.Tensor,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Logits of each row's last new token, and the caches with the new tokens in them.

        Args:
            input_ids: new tokens, (rows, chunk).
            seqlens: tokens that the cache of each row holds before, (rows).
            past_key_values: "<layer>.key" and "<layer>.value", each (rows, heads, buffer, size of a head).
            flat: the same as "past_key_values.<layer>.key" and so on.

        Returns:
            `logits` (rows, vocabulary), `present.<layer>.key` and `present.<layer>.value`, of the shapes of the past.
        """
        return self.in_slots(input_ids, seqlens, past_key_values or flat, input_ids=input_ids)

    def in_slots(
        self, tokens: torch.Tensor, seqlens: torch.Tensor, caches: Mapping[str, torch.Tensor], **given: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run the model's forward method with caches of fixed size.

        Args:
            tokens: new tokens, (rows, chunk).
            seqlens: tokens that the cache of each row holds before, (rows).
            caches: keys and values as `forward` takes them, in either form.
            given: the tokens or their embeddings, by the name that the model's forward method has for them.
        """
        own = {name.removeprefix(f"{PAST}."): tensor for name, tensor in caches.items()}
        past = {layer: (own[f"{layer}.key"], own[f"{layer}.value"]) for layer in range(len(own) // 2)}
        positions = seqlens[:, None] + torch.arange(tokens.shape[1], device=seqlens.device)
        slots = SlotCaches(past, positions, total_length(tokens, past[0][0]))
        parameters = inspect.signature(super().forward).parameters
        further = {"position_ids": positions, "logits_to_keep": 1}
        further = {name: value for name, value in further.items() if name in parameters}
        with running(slots) as cache, attending(self):
            further[str(cache_parameter(super().forward))] = cache
            outputs = super().forward(**given, use_cache=True, return_dict=True, **further)
        if slots.present.keys() != past.keys():
            raise UnsupportedBase(
                "attend to a cache of fixed size", problem="the model's layers have another attention"
            )
        result = {"logits": outputs.logits[:, -1]}
        for layer in past:
            result[f"present.{layer}.key"], result[f"present.{layer}.value"] = slots.present[layer]
        return result


def total_length(tokens: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """The operator's total_sequence_length, from shapes alone.

    The operator reads it in the CPU's memory, where no run on a device may have to wait for the lengths.  To it the
    chunk means a first piece of prompts, which several rows with a chunk must be; anything larger is only a limit.
    """
    rows, chunk, buffer = (torch.scalar_tensor(size, dtype=torch.int64) for size in (*tokens.shape, cache.shape[2]))
    return torch.where((rows == 1) | (chunk == 1), buffer, chunk).to(torch.int32)


@dataclass(frozen=True)
class SlotSizes:
    """Sizes of a model's slot form.

    Attributes:
        vocabulary: number of tokens.
        positions: largest number of tokens of a sequence.
        caches: heads and size of a head, of each layer's cache.
    """

    vocabulary: int
    positions: int
    caches: Sequence[tuple[int, int]]


def decoder_base(name: str, model: Any) -> TorchBase:
    """Make a base in slot form of a causal language model, which is left as it was.

    Args:
        name: for messages.
        model: a model of transformers with a cache parameter in its forward method.

    Raises:
        UnsupportedBase: it keeps no keys and values, or its attention is not what GroupQueryAttention computes.
    """
    sizes = slot_sizes(f"load base {name} for generation", model)
    inputs, axes = slot_inputs(sizes, next(model.parameters()).dtype)
    base = TorchBase(name, mixed_in(model), inputs, axes)
    base.decoder = slot_ports(sizes)
    return base


def slot_sizes(doing: str, model: Any) -> SlotSizes:
    """Sizes of the slot form of a model, which was compared with the forward method of the model on texts.

    Args:
        doing: for messages.
        model: as for `decoder_base`.

    Raises:
        UnsupportedBase: as `decoder_base`.
    """
    vocabulary, positions = _sizes(model, doing)
    tokens = _tokens(vocabulary)
    with comparing(doing, model) as check:
        expected, shapes = _own_logits(model, tokens)
        check(_slot_logits(mixed_in(model), tokens, shapes), expected)
    return SlotSizes(vocabulary, positions, shapes)


@contextmanager
def comparing(doing: str, model: nn.Module) -> Iterator[Callable[[torch.Tensor, torch.Tensor], None]]:
    """Run a model in evaluation mode; the function given compares logits in slot form with expected ones.

    Raises:
        UnsupportedBase: they differ, or the block raises anything.
    """
    training = model.training
    model.eval()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            yield lambda got, expected: found.append((got, expected))
    except Exception as failure:  # models raise every kind of exception; the cause is kept
        raise UnsupportedBase(
            doing, problem=f"the model does not run with caches of fixed size ({said_by(failure)})", fix=_FIX
        ) from failure
    finally:
        model.train(training)
    for got, expected in found:
        error = float((got - expected).norm() / expected.norm())
        if not error <= max(_LIMIT, 4 * torch.finfo(expected.dtype).eps):
            raise UnsupportedBase(
                doing,
                expected="the logits of the model's forward method",
                got=f"a relative error of {error:.2g} with caches of fixed size",
                fix=_FIX,
            )


def _sizes(model: Any, doing: str) -> tuple[int, int]:
    """Tokens of the vocabulary, and of the longest sequence."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    vocabulary, positions = (getattr(config, part, None) for part in ("vocab_size", "max_position_embeddings"))
    cached = cache_parameter(type(model).forward) is not None and kinds <= {"full_attention", "sliding_attention"}
    if not cached or not isinstance(vocabulary, int) or not isinstance(positions, int):
        raise UnsupportedBase(
            doing,
            expected="a causal language model of transformers with layers that keep keys and values of past tokens",
            got=f"{type(model).__name__} with layers {', '.join(sorted(kinds))}",
            fix=_FIX,
        )
    return vocabulary, positions


def _tokens(vocabulary: int) -> torch.Tensor:
    size = (len(_LENGTHS), max(_LENGTHS))
    return torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(0))


def _own_logits(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Logits of the last tokens of sequences by the model's forward method; heads and size of each layer's cache."""
    from transformers import DynamicCache

    cache, parameter = DynamicCache(), str(cache_parameter(type(model).forward))
    model(input_ids=tokens[:, :2], use_cache=True, **{parameter: cache})
    shapes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
    rows = [model(input_ids=tokens[row : row + 1, :length]).logits[0, -1] for row, length in enumerate(_LENGTHS)]
    return torch.stack(rows), shapes


def mixed_in(model: nn.Module, mixin: type[SlotDecoder] = SlotDecoder) -> nn.Module:
    """A module of the same layers and weights with the forward method of a mixin."""
    own, mixed = type(model), copy(model)
    mixed.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    return mixed


@contextmanager
def attending(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model attend by `attend`: they look in their configs, which the caller's model shares."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    found = [getattr(module, "config", None) for module in model.modules()]
    configs: list[Any] = [config for config in found if hasattr(config, "_attn_implementation")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _slot_logits(model: nn.Module, tokens: torch.Tensor, shapes: list[tuple[int, int]]) -> torch.Tensor:
    """The same in slot form: two pieces of each prompt, then one token of all rows."""
    dtype, rows = next(model.parameters()).dtype, list[dict[str, torch.Tensor]]()
    for row, length in enumerate(_LENGTHS):
        caches = slot_caches(shapes, 1, max(_LENGTHS), dtype)
        for start, end in ((0, 2), (2, length - 1)):
            caches = past_of(model(tokens[row : row + 1, start:end], torch.tensor([start]), **caches))
        rows.append(caches)
    joined = {name: torch.cat([caches[name] for caches in rows]) for name in rows[0]}
    pasts = torch.tensor(_LENGTHS) - 1
    logits: torch.Tensor = model(tokens.gather(1, pasts[:, None]), pasts, **joined)["logits"]
    return logits


def slot_caches(
    shapes: Sequence[tuple[int, int]], rows: int, buffer: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Caches with random values, by input name."""
    random = torch.Generator().manual_seed(0)
    return {
        f"{PAST}.{layer}.{part}": torch.randn(rows, heads, buffer, size, generator=random).to(dtype)
        for layer, (heads, size) in enumerate(shapes)
        for part in ("key", "value")
    }


def past_of(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Caches of the next run."""
    return {name.replace("present", PAST): tensor for name, tensor in outputs.items() if name != "logits"}


def slot_inputs(sizes: SlotSizes, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Example inputs and dynamic shapes."""
    rows, chunk, buffer = _EXAMPLE
    caches = slot_caches(sizes.caches, rows, buffer, dtype)
    tokens = _tokens(sizes.vocabulary)[:rows, :chunk].clone()
    inputs = {"input_ids": tokens, "seqlens": torch.zeros(rows, dtype=torch.int64), **caches}
    axes: dict[str, Any] = {name: {0: ROWS, 2: BUFFER} for name in inputs}
    return inputs, axes | {"input_ids": {0: ROWS, 1: CHUNK}, "seqlens": {0: ROWS}}


def slot_ports(sizes: SlotSizes) -> DecoderPorts:
    """Ports of a decoder that reads tokens alone."""
    names = [f"{layer}.{part}" for layer in range(len(sizes.caches)) for part in ("key", "value")]
    caches = tuple((f"{PAST}.{name}", f"present.{name}") for name in names)
    return DecoderPorts("input_ids", "seqlens", "logits", caches, sizes.positions, sizes.vocabulary)

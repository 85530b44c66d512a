"""Encoder-decoders of transformers for generation: an encoder with the memory of cross-attention, a decoder in slots.

Both components are the whole model with another forward method.  Keys and values of the decoder's cross-attention are
outputs of the encoder's graph, so they are computed once for each source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases import dotted_names
from tpeft_deploy.exporters.bases.component import Component
from tpeft_deploy.exporters.bases.kv_cache_inputs import PAST, cache_parameter
from tpeft_deploy.exporters.bases.slot_attention import SlotCaches, running
from tpeft_deploy.exporters.bases.slot_decoder import attending, comparing, total_length
from tpeft_deploy.exporters.oracle.decoder_runs import BUFFER, CHUNK, ROWS, SOURCE

__all__ = ["encoder_decoder"]

_Tensors = dict[str, torch.Tensor]

_MEMORY, _LENGTHS = "cross", "memory_lengths"
_EXAMPLE = (2, 3, 8, 6)  # rows, chunk, buffer and source: all different and none of them 1
_TARGETS = (7, 5)  # lengths of the sequences that the slot form is compared with the model's forward method on
_UNBOUNDED = 512  # positions of a model that has no table of them: those that T5 was trained with


def encoder_decoder(
    model: Any, inputs: _Tensors, axes: Mapping[str, Any], directory: Path | None = None
) -> dict[str, Component]:
    """Make the components `encoder` and `decoder` of a model for generation.

    Args:
        model: model of transformers.
        inputs: example inputs of the encoder, two rows.
        axes: dynamic shapes of these inputs.
        directory: directory of the model.

    Raises:
        UnsupportedBase: the decoder does not compute what the model's forward method does.
    """
    doing = f"load base {directory or type(model).__name__} for generation"
    encoder = Component(model, inputs, axes, forward=_encode if "input_ids" in inputs else _encode_sound)
    start = _start(model, doing)
    with comparing(doing, model) as check:
        decoder = _decoder(model, encoder, directory, start)
        check(*_both_logits(model, encoder, decoder))
    return {"encoder": encoder, "decoder": decoder}


def _decoder(model: Any, encoder: Component, directory: Path | None, start: int) -> Component:
    memory = _memory(encoder.base("encoder").module, encoder.example_inputs)
    layers, (heads, size) = len(memory) // 2, memory[f"{_MEMORY}.0.key"].shape[1::2]
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    rows, chunk, buffer, source = _EXAMPLE
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    inputs = {
        "input_ids": torch.randint(0, vocabulary, (rows, chunk), generator=random),
        "seqlens": torch.zeros(rows, dtype=torch.int64),
        _LENGTHS: torch.full((rows,), source),
    }
    given: dict[str, Any] = {"input_ids": {0: ROWS, 1: CHUNK}, "seqlens": {0: ROWS}, _LENGTHS: {0: ROWS}}
    for kind, length, axis in ((PAST, buffer, BUFFER), (_MEMORY, source, SOURCE)):
        for name in names:
            tensor = torch.randn(rows, heads, length, size, generator=random)
            inputs[f"{kind}.{name}"] = tensor.to(model.dtype)
            given[f"{kind}.{name}"] = {0: ROWS, 2: axis}
    ports = DecoderPorts(
        tokens="input_ids",
        lengths="seqlens",
        logits="logits",
        caches=tuple((f"{PAST}.{name}", f"present.{name}") for name in names),
        positions=_positions(model.config),
        vocabulary=vocabulary,
        memory=tuple(memory),
        memory_lengths=_LENGTHS,
        source="encoder",
        source_outputs=tuple(memory),
        start=start,
        source_positions=_source_positions(model),
    )
    return Component(model, inputs, given, forward=_decode, decoder=ports, directory=directory)


def _positions(config: Any) -> int:
    """Largest number of tokens of a sequence of the decoder."""
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), _UNBOUNDED)


def _source_positions(model: Any) -> int | None:
    """Largest number of positions of a source: the rows of the encoder's table of positions, where it has one."""
    if getattr(model.get_encoder(), "embed_positions", None) is None:
        return None
    names = ("max_source_positions", "max_position_embeddings")
    return next((value for name in names if isinstance(value := getattr(model.config, name, None), int)), None)


def _start(model: Any, doing: str) -> int:
    """First token of the decoder, as generate chooses it."""
    configs = (getattr(model, "generation_config", None), model.config)
    names = ("decoder_start_token_id", "bos_token_id")
    found = [value for name in names for own in configs if isinstance(value := getattr(own, name, None), int)]
    if not found:
        raise UnsupportedBase(doing, expected="decoder_start_token_id in config.json", got="none")
    return found[0]


def _encode(model: Any, input_ids: Any, attention_mask: Any) -> _Tensors:
    found = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
    return _with_memory(model, found.last_hidden_state)


def _encode_sound(model: Any, input_features: Any) -> _Tensors:
    return _with_memory(model, model.get_encoder()(input_features=input_features, return_dict=True).last_hidden_state)


def _with_memory(model: Any, states: torch.Tensor) -> _Tensors:
    """States of the encoder, and what the decoder's cross-attention makes of them in a run of one token.

    The exporter drops the rest of that run: nothing else of it is an output.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    _run(model, torch.zeros_like(states[:, :1, 0], dtype=torch.int64), states, cache)
    found = {"last_hidden_state": states}
    for layer, held in enumerate(cache.cross_attention_cache.layers):
        found[f"{_MEMORY}.{layer}.key"], found[f"{_MEMORY}.{layer}.value"] = held.keys, held.values
    return found


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    seqlens: torch.Tensor,
    memory_lengths: torch.Tensor,
    past_key_values: Mapping[str, torch.Tensor],
    cross: Mapping[str, torch.Tensor],
) -> _Tensors:
    """Logits of each row's last new token, and the caches with the new tokens in them."""
    past = {layer: (past_key_values[f"{layer}.key"], past_key_values[f"{layer}.value"]) for layer in _layers(cross)}
    memory = {layer: (cross[f"{layer}.key"], cross[f"{layer}.value"]) for layer in _layers(cross)}
    positions = seqlens[:, None] + torch.arange(input_ids.shape[1], device=seqlens.device)
    slots = SlotCaches(past, positions, total_length(input_ids, past[0][0]), memory, memory_lengths)
    states = past[0][0].new_zeros(input_ids.shape[0], 1, model.config.d_model)  # not read: the memory stands for them
    with running(slots) as cache, attending(model), _positioned(model.get_decoder(), positions):
        logits = _run(model, input_ids, states, cache)
    if slots.present.keys() != past.keys():
        raise UnsupportedBase("attend to a cache of fixed size", problem="the model's layers have another attention")
    result = {"logits": logits[:, -1]}
    for layer, (keys, values) in sorted(slots.present.items()):
        result[f"present.{layer}.key"], result[f"present.{layer}.value"] = keys, values
    return result


def _layers(tensors: Mapping[str, torch.Tensor]) -> range:
    return range(len(tensors) // 2)


def _run(model: Any, tokens: torch.Tensor, states: torch.Tensor, cache: object) -> torch.Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    logits: torch.Tensor = model.forward_of_whole(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=tokens,
        use_cache=True,
        return_dict=True,
        **{str(cache_parameter(model.forward_of_whole)): cache},
    ).logits
    return logits


@contextmanager
def _positioned(decoder: Any, positions: torch.Tensor) -> Iterator[None]:
    """Give a decoder's table of positions, where it has one, the positions of each row: it takes them from one past."""
    table = getattr(decoder, "embed_positions", None)
    if table is None:
        yield
        return

    def put(_table: object, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": positions}

    def shaped(_table: object, _args: object, found: torch.Tensor) -> torch.Tensor:
        return found.reshape(*positions.shape, -1)

    hooks = table.register_forward_pre_hook(put, with_kwargs=True), table.register_forward_hook(shaped)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _both_logits(model: Any, encoder: Component, decoder: Component) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of last tokens in slot form, and by the model's forward method: sources and targets of other lengths."""
    sources = [_row(encoder.example_inputs, row) for row in range(len(_TARGETS))]
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (len(_TARGETS), max(_TARGETS)), generator=random)
    expected = [
        model(**source, decoder_input_ids=tokens[row : row + 1, :length]).logits[0, -1]
        for row, (source, length) in enumerate(zip(sources, _TARGETS, strict=True))
    ]
    encode, decode = encoder.base("encoder").module, decoder.base("decoder").module
    memories = [_memory(encode, source) for source in sources]
    return _slot_logits(decode, tokens, memories, decoder.example_inputs), torch.stack(expected)


def _row(inputs: Mapping[str, torch.Tensor], row: int) -> _Tensors:
    """One source; tokens are fewer with each row."""
    return {
        name: tensor[row : row + 1, : tensor.shape[1] - 2 * row] if tensor.ndim == 2 else tensor[row : row + 1]
        for name, tensor in inputs.items()
    }


def _memory(encode: Any, source: Mapping[str, torch.Tensor]) -> _Tensors:
    with torch.no_grad():
        return {name: tensor for name, tensor in encode(**source).items() if name.startswith(_MEMORY)}


def _slot_logits(
    decode: Any, tokens: torch.Tensor, memories: Sequence[_Tensors], example: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Two pieces of each target, then one token of all rows."""
    sizes = [next(iter(memory.values())).shape[2] for memory in memories]
    lengths, rows = torch.tensor(sizes), list[_Tensors]()
    for row, length in enumerate(_TARGETS):
        missing = max(sizes) - sizes[row]
        filled = {
            name: torch.nn.functional.pad(own, (0, 0, 0, missing), value=3.0) for name, own in memories[row].items()
        }
        caches = filled | {name: tensor[row : row + 1] for name, tensor in example.items() if name.startswith(PAST)}
        for start, end in ((0, 2), (2, length - 1)):
            found = _call(
                decode, tokens[row : row + 1, start:end], torch.tensor([start]), lengths[row : row + 1], caches
            )
            caches |= {name.replace("present", PAST): own for name, own in found.items() if name != "logits"}
        rows.append(caches)
    joined = {name: torch.cat([caches[name] for caches in rows]) for name in rows[0]}
    pasts = torch.tensor(_TARGETS) - 1
    return _call(decode, tokens.gather(1, pasts[:, None]), pasts, lengths, joined)["logits"]


def _call(decode: Any, tokens: torch.Tensor, pasts: torch.Tensor, lengths: torch.Tensor, caches: _Tensors) -> _Tensors:
    found: _Tensors = decode(**dotted_names.nest({"input_ids": tokens, "seqlens": pasts, _LENGTHS: lengths, **caches}))
    return found

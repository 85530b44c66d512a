"""genai_config.json: the settings by which onnxruntime-genai serves the factored graph of a causal language model."""

from __future__ import annotations

import json
import re
from typing import Any

from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.proof.bundle_graphs import FACTORED

__all__ = ["GENAI_CONFIG", "genai_config"]

GENAI_CONFIG = "genai_config.json"

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def genai_config(base: Base, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> str | None:
    """Text of the file; None for a graph that onnxruntime-genai cannot drive.

    It can where the model has an end token, and the graph takes tokens, a mask, and caches that grow, and returns
    logits and the new caches.  Graphs in slot form take the lengths of the pasts, which it does not give.

    Args:
        base: base of the bundle.
        inputs: inputs of the graph.
        outputs: outputs of the graph.
    """
    config: Any = getattr(base.module, "config", None)
    pasts = [port for port in inputs if _PAST.fullmatch(port.name)]
    presents = {port.name.replace("past_key_values", "present") for port in pasts}
    logits = next((port for port in outputs if port.name == "logits"), None)
    if getattr(config, "eos_token_id", None) is None:
        return None  # onnxruntime-genai would end at token 0
    if not pasts or logits is None or {port.name for port in outputs} != presents | {"logits"}:
        return None
    sizes = {port.shape[1:] for port in pasts}
    if {port.name for port in inputs} - {port.name for port in pasts} != {"input_ids", "attention_mask"}:
        return None
    if len({(shape[0], shape[2]) for shape in sizes}) != 1:
        return None  # onnxruntime-genai takes one number of heads for all layers
    heads, _, head_size = next(iter(sizes))
    layers = len(pasts) // 2
    decoder = {
        "session_options": {"provider_options": []},
        "filename": FACTORED,
        "head_size": head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    length = getattr(config, "max_position_embeddings", 2048)
    model = {"type": "decoder", "context_length": length, "vocab_size": logits.shape[-1], "decoder": decoder}
    model |= {name: getattr(config, name) for name in _TOKENS if getattr(config, name, None) is not None}
    search = {"max_length": length, "do_sample": False, "past_present_share_buffer": False}
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"

"""Small causal language models of transformers with PEFT adapters, and what their merged models generate."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **NO_ENDS,
}
ONE = {"num_hidden_layers": 1}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 6,
    "final_logit_softcapping": 4.0,
    "layer_types": ["sliding_attention", "full_attention"],
}
Made = tuple[str, dict[str, Any], list[str]]
MODELS: dict[str, Made] = {
    "llama": ("LlamaForCausalLM", SIZES | ONE, ["q_proj", "v_proj", "down_proj", "lm_head"]),
    "qwen3": ("Qwen3ForCausalLM", SIZES | ONE | {"head_dim": 16}, ["k_proj", "o_proj"]),
    "gemma3": ("Gemma3ForCausalLM", SIZES | GEMMA3, ["q_proj", "v_proj"]),
    "gpt2": ("GPT2LMHeadModel", GPT2 | NO_ENDS, ["c_attn", "c_fc"]),
    "mixtral": (
        "MixtralForCausalLM",
        SIZES | ONE | {"num_local_experts": 4, "sliding_window": None},
        ["q_proj", "v_proj"],
    ),
    "phi": ("PhiForCausalLM", SIZES | ONE | {"partial_rotary_factor": 0.5}, ["q_proj", "dense"]),
}


def made(name: str, positions: int = 64) -> Any:
    kind, sizes, _ = MODELS[name]
    sizes = sizes | {"n_positions" if name == "gpt2" else "max_position_embeddings": positions}
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")
    return model


def trained(name: str, place: Path, positions: int = 64) -> dict[str, Path]:
    """Two PEFT directories."""
    _, _, targets = MODELS[name]
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
        config = LoraConfig(r=2 + seed, lora_alpha=8, target_modules=targets, **options)
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
            model = get_peft_model(made(name, positions), config)
        model.save_pretrained(str(place / task), save_embedding_layers=False)
    return {task: place / task for task in ("a", "b")}


def generated(
    name: str, adapter: Path | None, prompt: list[int], count: int, positions: int = 64
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """New tokens of `generate` of a merged model, and their logits."""
    model = made(name, positions)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    logits = torch.cat(found.logits)
    return found.sequences[0, len(prompt) :].tolist(), logits.numpy()

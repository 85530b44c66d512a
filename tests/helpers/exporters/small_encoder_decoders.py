"""Small encoder-decoders of transformers with PEFT adapters, and what their merged models generate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.generation import GenerationMixin

from tpeft_deploy.training import TuckerConfig

Array = np.ndarray[Any, Any]

START = 3
TOKENS = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
TOKENS |= {"decoder_start_token_id": START}
T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_heads": 4, "relative_attention_num_buckets": 8}
T5 |= {"relative_attention_max_distance": 20}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.3,
    "max_position_embeddings": 160,
    "forced_eos_token_id": None,
}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 160}
WHISPER |= {"begin_suppress_tokens": None, "suppress_tokens": None}
ATTENTION = ["q_proj", "k_proj", "v_proj"]  # of the encoder, of the decoder, and of its cross-attention
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "t5": ("T5ForConditionalGeneration", T5, ["q", "k", "v", "wo"]),
    "mt5": ("MT5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, ["q", "k", "v"]),
    "bart": ("BartForConditionalGeneration", BART, [*ATTENTION, "fc1"]),
    "mbart": ("MBartForConditionalGeneration", BART, ATTENTION),
    "marian": ("MarianMTModel", BART, ATTENTION),
    "pegasus": ("PegasusForConditionalGeneration", BART, ATTENTION),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, ["conv1", *ATTENTION]),
}


def made(name: str, layers: int = 1) -> Any:
    kind, sizes, _ = MODELS[name]
    parts = ("num_layers",) if "t5" in name else ("encoder_layers", "decoder_layers")
    sizes = sizes | dict.fromkeys(parts, layers)
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**TOKENS | sizes)).eval()


def trained(name: str, place: Path, layers: int = 1, tasks: Sequence[str] = ("a", "b")) -> dict[str, Path]:
    """A PEFT directory for each task, the first of Tucker adapters where there are convolutions."""
    targets = MODELS[name][2]
    tucker = TuckerConfig(ranks=2, target_modules=targets)
    # Whisper asks its convolution for the stride, which LoRA's layer of PEFT has not.
    lora = LoraConfig(
        r=3, lora_alpha=8, target_modules=[own for own in targets if own != "conv1"], init_lora_weights=False
    )
    for seed, task in enumerate(tasks):
        config = tucker if seed == 0 and "conv1" in targets else lora
        torch.manual_seed(seed)
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
            model = get_peft_model(made(name, layers), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(str(place / task), save_embedding_layers=False)
    return {task: place / task for task in tasks}


def source(name: str, row: int) -> dict[str, Array]:
    """A source without the axis of the batch; each row's has another length, where they may."""
    random = np.random.default_rng(row)
    if name == "whisper":
        return {"input_features": random.standard_normal((8, 20)).astype(np.float32)}
    length = 9 - 2 * row
    return {"input_ids": random.integers(1, 50, length), "attention_mask": np.ones(length, np.int64)}


def generated(
    name: str, adapter: Path | None, given: Mapping[str, Array], prompt: Sequence[int], count: int, layers: int = 1
) -> tuple[list[int], Array]:
    """New tokens of `generate` of a merged model, and their logits."""
    model = made(name, layers)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    inputs = {key: torch.from_numpy(array)[None] for key, array in given.items()}
    options = {"do_sample": False, "max_new_tokens": count, "return_dict_in_generate": True, "output_logits": True}
    # Whisper's generate takes windows of long sounds apart, and calls this one for each.
    found = GenerationMixin.generate(model, **inputs, decoder_input_ids=torch.tensor([prompt]), **options)
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits).numpy()

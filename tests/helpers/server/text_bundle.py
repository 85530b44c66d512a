"""A bundle of a small Llama with two tasks, a tokenizer and a chat template."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.runtime.tokenizers_of_styles import fast
from tpeft_deploy import Bundle, export_bundle, load_adapter

POSITIONS = 1024
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=402, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text_bundle(place: Path) -> Bundle:
    """Export the bundle, with the tasks "a" and "b"."""
    base = place / "base"
    _model().save_pretrained(base)
    fast("byte-level", chat_template=TEMPLATE).save_pretrained(base)
    adapters = {}
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
            get_peft_model(_model(), config).save_pretrained(str(place / task))
        adapters[task] = load_adapter(place / task, base=_model())
    return export_bundle(base, adapters, place / "talk", generation=True)

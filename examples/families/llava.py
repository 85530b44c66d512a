"""LLaVA with adapters of vision tower, projector and language model: prompts of two images, one and none side by side.

    python -m examples.families.llava --out DIR [--full]

Weights, adapters and images are random: the figures show exactness, memory and time, not quality.  `--full` has the
sizes of llava-interleave-qwen-0.5b with 2048 positions: SigLIP at 384 x 384, 729 features of an image, and
Qwen1.5-0.5B; 0.9 billion weights, 3.5 GB in float32.  LLaVA 1.5 with 7 billion weights has 28 GB in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.utils import logging

from examples.families.figures import options, record
from examples.families.generating import SLOTS, Row, answer, compared, costs, exported, merge
from tpeft_deploy import Runtime

VISION: dict[bool, dict[str, Any]] = {
    False: {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 16, "patch_size": 8,
    },
    True: {
        "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 16, "intermediate_size": 4304,
        "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
TEXT: dict[bool, dict[str, Any]] = {
    False: {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    },
    True: {
        "vocab_size": 152000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    },
}  # fmt: skip
IMAGE = {False: 49, True: 151646}  # id of an image's token
LANGUAGE, TOWER = r".*language_model.*", r".*vision_tower.*layers\.0\."
TASKS: dict[str, PeftConfig] = {
    name: LoraConfig(r=rank, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    for name, rank, targets in [
        ("charts", 2, rf"{LANGUAGE}(q_proj|v_proj)|{TOWER}.*q_proj|.*projector\.linear_2"),
        ("documents", 3, rf"{LANGUAGE}(k_proj|down_proj)|{TOWER}.*fc1|.*projector\.linear_1"),
    ]
}
IMAGES = {"charts": 2, "documents": 1, "base": 0}  # of the prompt of each row


def make(place: Path, *, full: bool) -> None:
    """Save a base with random weights."""
    vision = SiglipVisionConfig(**VISION[full], vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT[full], tie_word_embeddings=full),
        image_token_id=IMAGE[full], vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=full,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(place)


def run(place: Path, *, full: bool) -> dict[str, Any]:
    """Compare rows of all tasks, with two images, one and none, with `generate` of each merged model."""
    make(place / "base", full=full)

    def load() -> Any:
        return LlavaForConditionalGeneration.from_pretrained(place / "base").eval()

    count, size = 16 if full else 12, VISION[full]["image_size"]
    seen = [IMAGE[full]] * (size // VISION[full]["patch_size"]) ** 2
    random, wanted, rows = torch.Generator().manual_seed(1), [], []
    for seed, (task, images) in enumerate(IMAGES.items()):
        model = load() if task == "base" else merge(load, TASKS[task], place / task, seed)
        prompt = [5, *(token for image in range(images) for token in [*seen, 9 + image]), 31, 7]
        pixels = torch.randn(images, 3, size, size, generator=random)
        ids = torch.tensor([prompt])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
            {"pixel_values": pixels} if images else {}
        )
        wanted.append(answer(model, given, prompt, count))
        rows.append(Row(task, prompt, {"pixel_values": pixels.numpy()} if images else None))
        del model
    bundle, figures = exported(place, list(TASKS))
    positions = TEXT[full]["max_position_embeddings"]
    with Runtime(bundle.path, provider="cpu", threads=1, kv_bytes=3 * 2**29, max_tokens=positions) as runtime:
        figures |= {"images of the rows": ", ".join(map(str, IMAGES.values())), "prompt tokens": len(rows[0].prompt)}
        figures |= compared(runtime, rows, wanted, count)
        assert runtime.usage()["slots"] >= SLOTS
        if full:
            record("llava", figures, full)  # rates take minutes more
        return {**figures, "generation": costs(runtime, rows, count, 1)}


if __name__ == "__main__":
    chosen = options(__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record("llava", run(chosen.out, full=chosen.full), chosen.full)

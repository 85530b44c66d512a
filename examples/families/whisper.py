"""Whisper with adapters of its convolutional stem, encoder and decoder, rows of all tasks in one batch.

    python -m examples.families.whisper --out DIR [--full]

"accent" has the paper's Tucker form on both convolutions of the stem and on attention, "terms" LoRA on attention of
encoder, decoder and cross-attention and on feed-forward layers.  Weights, adapters and sounds are random: the figures
show exactness, memory and time, not quality.  `--full` has the configuration of whisper-base, 73 million weights, and
30 seconds of sound: 3000 frames of 80 mels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.utils import logging

from examples.families.figures import options, record
from examples.families.generating import SLOTS, Row, answer, compared, costs, exported, merge
from tpeft_deploy import Runtime
from tpeft_deploy.training import TuckerConfig

ATTENTION = ["q_proj", "k_proj", "v_proj"]
SMALL: dict[str, Any] = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 10, "max_target_positions": 64, "init_std": 0.3, "decoder_start_token_id": 3,
}  # fmt: skip
FULL: dict[str, Any] = {
    "vocab_size": 51865, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "num_mel_bins": 80,
    "max_source_positions": 1500, "max_target_positions": 448, "init_std": 0.05, "decoder_start_token_id": 50258,
}  # fmt: skip
ENDS: dict[str, Any] = {
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
TASKS: dict[str, PeftConfig] = {
    "accent": TuckerConfig(ranks=4, target_modules=["conv1", "conv2", *ATTENTION], init_weights=False),
    "terms": LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "fc1"], init_lora_weights=False),
}
ORDER = ["accent", "terms", "base"]


def run(place: Path, *, full: bool) -> dict[str, Any]:
    """Compare rows of all tasks, a sound each, with `generate` of each merged model."""
    sizes, count = FULL if full else SMALL, 32 if full else 12
    torch.manual_seed(0)
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **ENDS)).save_pretrained(place / "base")

    def load() -> Any:
        return WhisperForConditionalGeneration.from_pretrained(place / "base").eval()

    frames, prompt = 2 * sizes["max_source_positions"], [sizes["decoder_start_token_id"]]
    sounds = torch.randn(len(ORDER), sizes["num_mel_bins"], frames, generator=torch.Generator().manual_seed(1))
    wanted, rows = [], []
    for seed, task in enumerate(ORDER):
        model = load() if task == "base" else merge(load, TASKS[task], place / task, seed)
        given = {"input_features": sounds[seed : seed + 1], "decoder_input_ids": torch.tensor([prompt])}
        wanted.append(answer(model, given, prompt, count))
        rows.append(Row(task, prompt, {"input_features": sounds[seed].numpy()}))
        if task != "base":
            assert answer(load(), given, prompt, count).tokens != wanted[-1].tokens, f"{task} changes nothing"
    bundle, figures = exported(place, list(TASKS))
    with Runtime(
        bundle.path, provider="cpu", threads=1, kv_bytes=2**29, max_tokens=sizes["max_target_positions"]
    ) as runtime:
        figures |= compared(runtime, rows, wanted, count)
        assert runtime.usage()["slots"] >= SLOTS
        return {**figures, "generation": costs(runtime, rows, count, 3 if full else 1)}


if __name__ == "__main__":
    chosen = options(__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record("whisper", run(chosen.out, full=chosen.full), chosen.full)

"""Seconds of a whole bundle with its proof, against a plain export of the same module.

    python benchmarks/export_time.py [--model NAME] [--before DIRECTORY] [--rounds N] [--json]

| model | what | targets |
|---|---|---|
| deberta | DebertaV2ForSequenceClassification with the configuration of DeBERTaV3-base, 184 M weights | 73 |
| t5 | T5ForConditionalGeneration of width 32, 6 + 6 layers | 96 |
| unet | UNet2DConditionModel of 28 M weights | 128 |
| sdxl | UNet2DConditionModel with the blocks of SDXL, narrow and a third as deep: 23 transformer blocks | 184 |

Random weights, one LoRA of rank 8 that PEFT saved, so that the proof runs PEFT's forward too.  Plain is
`torch.onnx.export(dynamo=True, optimize=True)` and saving its program.  Every measurement is a process of its own,
with imports done and a small export behind it; plain, `--before` (a checkout of another version) and this one take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
Made = tuple[Any, dict[str, Any], dict[str, Any], list[str]]


def deberta() -> Made:
    """Model, inputs, dynamic shapes, and the targets of its adapter; as for all that follow."""
    import torch
    import transformers

    config = transformers.DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=128_100,
        position_buckets=256, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", max_relative_positions=-1, position_biased_input=False, type_vocab_size=0,
        layer_norm_eps=1e-7,
    )  # fmt: skip
    ids = torch.randint(0, 128_000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    model = transformers.DebertaV2ForSequenceClassification(config)
    return model, inputs, shapes, ["query_proj", "key_proj", "value_proj", "dense"]


def t5() -> Made:
    import torch
    import transformers

    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=6, num_heads=4, vocab_size=100, decoder_start_token_id=0,
        use_cache=False,
    )  # fmt: skip
    ids = torch.randint(1, 100, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :7].contiguous()}
    shapes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    shapes["decoder_input_ids"] = {0: "batch", 1: "decoded"}
    model = logits_of(transformers.T5ForConditionalGeneration(config))
    return model, inputs, shapes, ["q", "k", "v", "o", "wi", "wo"]


def unet() -> Made:
    import diffusers
    import torch

    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 192, 256), attention_head_dim=8, cross_attention_dim=256,
        norm_num_groups=16,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor(7), "hidden": torch.randn(2, 9, 256)}
    return denoiser(model), inputs, {"sample": {0: "batch"}, "timestep": {}, "hidden": {0: "batch"}}, ATTENTION


def sdxl() -> Made:
    import diffusers
    import torch

    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128), attention_head_dim=(2, 4, 8), cross_attention_dim=64,
        norm_num_groups=16, transformer_layers_per_block=(1, 1, 3), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(7),
        "hidden": torch.randn(2, 9, 64),
        "text": torch.randn(2, 32),
        "times": torch.randn(2, 6),
    }
    shapes = {name: {} if name == "timestep" else {0: "batch"} for name in inputs}
    return denoiser(model), inputs, shapes, ATTENTION


MODELS = {"deberta": deberta, "t5": t5, "unet": unet, "sdxl": sdxl}


def logits_of(model: Any) -> Any:
    """A model that returns its logits alone."""
    from torch import nn

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, decoder_input_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids
            ).logits

    return Wrapped()


def denoiser(model: Any) -> Any:
    """A UNet that returns its sample alone."""
    from torch import nn

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: Any, timestep: Any, hidden: Any, text: Any = None, times: Any = None) -> Any:
            more = None if text is None else {"text_embeds": text, "time_ids": times}
            return self.model(sample, timestep, hidden, added_cond_kwargs=more, return_dict=False)[0]

    return Wrapped()


def measure(name: str, what: str) -> dict[str, float]:
    """Seconds of one export, and how many targets the adapter has."""
    warnings.simplefilter("ignore")
    import torch
    from peft import LoraConfig, get_peft_model

    from tpeft_deploy import export_bundle, load_adapter

    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), dynamo=True, verbose=False)
    model, inputs, shapes, targets = MODELS[name]()
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        tuned = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
        tuned.save_pretrained(folder)
        model = tuned.unload()
        adapter = load_adapter(folder)
        start = time.perf_counter()
        if what == "plain":
            program = torch.onnx.export(
                model, (), kwargs=inputs, dynamo=True, optimize=True, dynamic_shapes=shapes, verbose=False
            )
            if program is None:
                raise SystemExit("torch exported nothing")
            program.save(f"{folder}/plain.onnx", external_data=True)
        else:
            export_bundle(model, {"a": adapter}, f"{folder}/bundle", example_inputs=inputs, dynamic_shapes=shapes)
        took = time.perf_counter() - start
    return {"seconds": took, "targets": len(adapter.deltas), "weights": sum(p.numel() for p in model.parameters())}


def in_turns(name: str, trees: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Medians of the seconds, and their ratios to plain within a round."""
    found: dict[str, list[float]] = {"plain": [], **{tree: [] for tree in trees}}
    facts: dict[str, float] = {}
    for _ in range(rounds):
        for what, seconds in found.items():
            tree = trees.get(what, ROOT)
            line = [sys.executable, __file__, "--model", name, "--measure", what]
            own = os.environ | {"PYTHONPATH": str(tree)}
            done = subprocess.run(line, cwd=tree, env=own, check=True, capture_output=True, text=True)
            facts = json.loads(done.stdout.splitlines()[-1])
            seconds.append(facts["seconds"])
    row: dict[str, Any] = {"model": name, "targets": facts["targets"], "weights": facts["weights"]}
    for what, seconds in found.items():
        row[f"{what}, s"] = round(statistics.median(seconds), 1)
        if what != "plain":
            ratios = [mine / plain for mine, plain in zip(seconds, found["plain"], strict=True)]
            row[f"{what} / plain"] = round(statistics.median(ratios), 2)
    return row


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS))
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.model, options.measure)))
        return
    trees = ({"before": options.before.resolve()} if options.before else {}) | {"this": ROOT}
    for name in [options.model] if options.model else MODELS:
        row = in_turns(name, trees, options.rounds)
        print(
            json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )


if __name__ == "__main__":
    main()

"""InternVL: its vision model with LoRA adapters, and the whole model as three components that an adapter spans.

    python -m examples.families.internvl --out DIR [--full]

Weights and adapters are random: the figures show exactness, memory and time, not quality.  `--full` has the vision
model in the configuration of InternViT-300M at 448 x 448: 304 million weights, 1025 positions.  The whole model is
small in both cases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2Config,
)
from transformers.utils import logging

from examples.families.answers import LIMIT, adapted, error, merged
from examples.families.figures import forms, gate, measuring, options, record
from examples.families.vision import outputs, worst
from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.tucker import Array

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": [56, 56], "initializer_range": 0.1,
}  # fmt: skip
FULL: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "image_size": [448, 448],
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "projection_layer"]
TASKS: dict[str, PeftConfig] = {
    "charts": LoraConfig(r=8, target_modules=ATTENTION, init_lora_weights=False),
    "documents": LoraConfig(r=4, target_modules=[*ATTENTION, "fc1", "fc2"], init_lora_weights=False),
}
IMAGE, VOCABULARY, TOKENS = 7, 64, 4  # id of an image's tokens, ids, and tokens of an image of the small model


def vision_config(*, full: bool) -> InternVLVisionConfig:
    """The vision model's configuration: InternViT has biases in attention."""
    return InternVLVisionConfig(**(FULL if full else SMALL), attention_bias=True, layer_scale_init_value=0.1)


def randomised(model: Any) -> Any:
    """Make the positions and the class token, zero in a new model, random."""
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name.endswith(("position_embeddings", "cls_token")):
                own.normal_(std=0.1)
    return model.eval()


def vision(place: Path, *, full: bool) -> dict[str, Any]:
    """Export the vision model, and compare every row of a mixed batch with PEFT's merged models."""
    config = vision_config(full=full)
    pixels = torch.randn(3, 3, *config.image_size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    base = randomised(InternVLVisionModel(config))
    base.save_pretrained(place / "base")
    order = [*TASKS, "base"]
    wanted = [[own[0] for own in outputs(base, pixels[2:])]]
    for row, (name, method) in reversed([*enumerate(TASKS.items())]):
        model = merged(adapted(InternVLVisionModel.from_pretrained(place / "base"), method), place / name)
        wanted.insert(0, [own[0] for own in outputs(model, pixels[row : row + 1])])
        del model
    adapters = {name: load_adapter(place / name, base=base) for name in TASKS}
    with measuring() as export:
        bundle = export_bundle(base, adapters, place / "vision", example_inputs={"pixel_values": pixels[:2]})
    names = [port.name for port in bundle.manifest.outputs]
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        found = runtime.run({"pixel_values": pixels.numpy()}, tasks=order)
        plain = runtime.run({"pixel_values": pixels[:1].numpy()})
    assert error(plain[names[0]][0], wanted[0][0]) > 100 * LIMIT, "the adapter changes next to nothing"
    errors = worst([[found[name][row] for name in names] for row in range(len(order))], wanted)
    assert errors <= LIMIT, errors
    figures = {
        "weights, MB": bundle.manifest.files["weights.data"].bytes / 2**20, "export, s": export.seconds,
        "export, MB at most beside what the process held": export.megabytes, "errors at export": gate(bundle),
        "error of a mixed batch": errors,
    }  # fmt: skip
    if full:
        record("internvl", figures, full)  # latencies take minutes more
    del base
    return {**figures, "latency": forms(bundle, (1,) if full else (1, 2), 0, threads=1)}


def whole_model(place: Path) -> Any:
    """Make a small InternVL with a Qwen2 decoder, and save it."""
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision_config(full=False).to_dict(), text_config=text.to_dict(), image_token_id=IMAGE
    )
    torch.manual_seed(1)
    model = randomised(InternVLForConditionalGeneration(config))
    model.save_pretrained(place)
    return model


def components(place: Path) -> dict[str, Any]:
    """Export the whole model as components, and compare logits of two rows, an image each, with PEFT's merged model."""
    base = whole_model(place / "base")
    again = InternVLForConditionalGeneration.from_pretrained(place / "base").eval()
    targets = r".*(q_proj|projection_layer|fc2|multi_modal_projector\.linear_1|down_proj)"
    model = merged(adapted(again, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)), place / "charts")
    pixels = torch.randn(2, 3, *SMALL["image_size"])
    ids = torch.tensor([[1, *[IMAGE] * TOKENS, 9, 11], [2, 3, *[IMAGE] * TOKENS, 12]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
        wanted = [own(**given).logits[row].numpy() for row, own in enumerate((model, base))]
    adapters = {"charts": load_adapter(place / "charts", base=str(place / "base"))}
    bundle = export_bundle(str(place / "base"), adapters, place / "bundle")
    tasks = ["charts", "base"]
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        seen = runtime.run({"pixel_values": pixels.numpy()}, tasks=tasks, component="vision")["image_features"]
        embedded = runtime.run({"input_ids": ids.numpy()}, tasks=tasks, component="embedding")["inputs_embeds"]
        states: Array = np.array(embedded)
        states[ids.numpy() == IMAGE] = np.concatenate(list(seen))
        prompt = {"inputs_embeds": states, "attention_mask": mask.numpy()}
        logits = runtime.run(prompt, tasks=tasks, component="language")["logits"]
    errors = max(error(logits[row], wanted[row]) for row in range(2))
    assert errors <= LIMIT, errors
    return {"components, small": ", ".join(bundle.components), "error of images and text together": errors}


def run(place: Path, *, full: bool) -> dict[str, Any]:
    """Run both."""
    return {**components(place / "whole"), **vision(place / "vision", full=full)}


if __name__ == "__main__":
    chosen = options(__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record("internvl", run(chosen.out, full=chosen.full), chosen.full)

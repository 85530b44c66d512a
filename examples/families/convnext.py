"""ConvNeXt-V2 with heads of 2, 10 and 1000 classes in one mixed batch, and as a backbone with maps at four strides.

    python -m examples.families.convnext --out DIR [--full]

Tasks are groups of scikit-learn's digits, trained for two steps from random weights: the figures show exactness, memory
and time, not quality.  "halves" has LoRA on linears and strided convs, "digits" the paper's Tucker form on depthwise,
strided and patch convs (4 modes), "thousand" Tucker on the linears too.  `--full` has the configuration of
ConvNeXtV2-tiny at 224 x 224: 28.6 million weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from sklearn.datasets import load_digits
from transformers import ConvNextV2Backbone, ConvNextV2Config, ConvNextV2ForImageClassification
from transformers.utils import logging

from examples.families.answers import LIMIT, adapted, error, merged
from examples.families.figures import forms, gate, measuring, options, record
from examples.families.vision import outputs, worst
from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.exporters import Component
from tpeft_deploy.training import TuckerConfig
from tpeft_deploy.tucker import Array

SMALL: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "image_size": 64}
FULL: dict[str, Any] = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768], "image_size": 224}
CONVS = ["dwconv", "downsampling_layer.1", "patch_embeddings"]
LINEARS = ["pwconv1", "pwconv2"]
HEAD = ["classifier"]
TASKS: dict[str, tuple[int, PeftConfig]] = {
    "halves": (2, LoraConfig(r=8, target_modules=[*LINEARS, "downsampling_layer.1"], modules_to_save=HEAD)),
    "digits": (10, TuckerConfig(ranks=8, target_modules=CONVS, modules_to_save=HEAD)),
    "thousand": (1000, TuckerConfig(ranks=8, target_modules=CONVS + LINEARS, modules_to_save=HEAD)),
}
MAPS = ["stage1", "stage2", "stage3", "stage4"]  # strides of 4, 8, 16 and 32 pixels


def digits(count: int, size: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits of scikit-learn, enlarged, in three channels, with their values."""
    data = load_digits()
    images = torch.from_numpy(data.images[start : start + count]).float()[:, None] / 8 - 1
    pixels = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear").repeat(1, 3, 1, 1)
    return pixels, torch.from_numpy(data.target[start : start + count])


def train(model: Any, classes: int, size: int, steps: int = 2, rows: int = 4) -> None:
    """Train the adapter and the head: a digit's class is its share of the classes."""
    optimiser = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=2e-2)
    for step in range(steps):
        pixels, values = digits(rows, size, step * rows)
        loss = model(pixel_values=pixels, labels=values * classes // 10).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def build(place: Path, sizes: Mapping[str, Any], pixels: torch.Tensor) -> dict[str, Array]:
    """Make the base, train and save the tasks; returns logits of all images by task, of PEFT's merged models."""
    torch.manual_seed(0)
    base = ConvNextV2ForImageClassification(ConvNextV2Config(**sizes, num_labels=1000)).eval()
    base.save_pretrained(place / "base")
    [logits] = outputs(base, pixels)
    found, states = {"base": logits}, outputs(base.convnextv2, pixels)[1]
    for name, (classes, config) in TASKS.items():
        torch.manual_seed(len(found))
        own = ConvNextV2ForImageClassification.from_pretrained(
            place / "base", num_labels=classes, ignore_mismatched_sizes=True
        )
        model = adapted(own, config)
        train(model, classes, sizes["image_size"])
        model = merged(model, place / name)
        [found[name]] = outputs(model, pixels)
        assert found[name].shape == (len(pixels), classes)
        assert error(outputs(model.convnextv2, pixels)[1], states) > 100 * LIMIT, f"{name} changes next to nothing"
    return found


def classifier(place: Path, *, full: bool) -> dict[str, Any]:
    """Export the classifier, serve all tasks in one batch, and compare each row with PEFT's merged model."""
    sizes = FULL if full else SMALL
    tasks = [*TASKS, "base"]
    pixels, _ = digits(len(tasks), sizes["image_size"], 100)
    wanted = build(place, sizes, pixels)
    adapters = {name: load_adapter(place / name, base=str(place / "base")) for name in TASKS}
    with measuring() as export:
        bundle = export_bundle(str(place / "base"), adapters, place / "classifier")
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        answers = runtime.run({"pixel_values": pixels.numpy()}, tasks=tasks)["logits"]
    errors = worst([[own] for own in answers], [[wanted[task][row]] for row, task in enumerate(tasks)])
    assert errors <= LIMIT, errors
    return {
        "export, s": export.seconds, "export, MB at most beside what the process held": export.megabytes,
        "weights, MB": bundle.manifest.files["weights.data"].bytes / 2**20, "errors at export": gate(bundle),
        "error of a mixed batch": errors, "latency": forms(bundle, (1, 4), 20 if full else 0, threads=1),
    }  # fmt: skip


def _maps(backbone: Any, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(MAPS, backbone.forward_of_whole(pixel_values).feature_maps, strict=True))


def backbone(place: Path, *, full: bool) -> dict[str, Any]:
    """Export the backbone with two adapters, and compare the maps of each row of a mixed batch."""
    sizes = FULL if full else SMALL
    config = ConvNextV2Config(**sizes, out_features=MAPS)
    tasks = {"lora": LoraConfig(r=8, target_modules=LINEARS, init_lora_weights=False),
             "tucker": TuckerConfig(ranks=8, target_modules=CONVS, init_weights=False)}  # fmt: skip
    pixels, _ = digits(len(tasks) + 1, sizes["image_size"], 200)
    wanted: dict[str, list[Array]] = {}
    for name in ("base", *tasks):
        torch.manual_seed(0)
        model = ConvNextV2Backbone(config).eval()
        if name == "base":
            base = model
        else:
            model = merged(adapted(model, tasks[name]), place / name)
        wanted[name] = outputs(model, pixels)
        assert name == "base" or error(wanted[name][-1], wanted["base"][-1]) > 100 * LIMIT
    part = Component(base, {"pixel_values": pixels[:2]}, {"pixel_values": {0: "batch"}}, forward=_maps)
    adapters = {name: load_adapter(place / name, base=part.base_view) for name in tasks}
    with measuring() as export:
        bundle = export_bundle({"backbone": part}, adapters, place / "backbone")
    order = list(wanted)
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        found = runtime.run({"pixel_values": pixels.numpy()}, tasks=order)
    answers = [[np.asarray(found[name][row]) for name in MAPS] for row in range(len(order))]
    errors = worst(answers, [[own[row] for own in wanted[name]] for row, name in enumerate(order)])
    assert errors <= LIMIT, errors
    return {
        "backbone: export, s": export.seconds, "backbone: errors at export": gate(bundle),
        "backbone: error of a mixed batch": errors,
        "backbone: maps": ", ".join("x".join(map(str, own.shape)) for own in answers[0]),
    }  # fmt: skip


def run(place: Path, *, full: bool) -> dict[str, Any]:
    """Run both."""
    return {**classifier(place / "classes", full=full), **backbone(place / "maps", full=full)}


if __name__ == "__main__":
    chosen = options(__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record("convnext", run(chosen.out, full=chosen.full), chosen.full)

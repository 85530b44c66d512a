"""A model of two parts, and a bundle of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle, Component, export_bundle


class Pair(nn.Module):
    """A convolution over images, and a head with an embedding that is tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 8))
        self.text = nets.TextNet()


def pair() -> Pair:
    torch.manual_seed(3)
    return Pair().eval()


def components(model: Pair) -> dict[str, Component]:
    """Its components, `vision` and `text`, each a part with its place."""
    return {
        "vision": Component(model.vision, {"input": torch.randn(2, 1, 8, 8)}, prefix="vision"),
        "text": Component(model.text, {"ids": torch.randint(0, 20, (2, 5))}, prefix="text"),
    }


def pair_components() -> dict[str, Component]:
    """A factory of several components, as the command line takes it."""
    return components(pair())


def adapters(model: Pair) -> dict[str, Adapter]:
    """One adapter for both components, and one for each."""
    vision = {"vision.0.weight": (2, 1, 2, 2), "vision.3.weight": (2, 2)}
    text = {"text.mix.weight": (3, 3)}
    return {
        "both": nets.adapter_for(model, vision | text, seed=1),
        "seeing": nets.adapter_for(model, vision, seed=2),
        "reading": nets.adapter_for(model, text, seed=3),
    }


def two_component_bundle(path: Path) -> Bundle:
    """A bundle with components `vision` (float input) and `text` (tokens) and the tasks of `adapters`."""
    model = pair()
    return export_bundle(components(model), adapters(model), path)

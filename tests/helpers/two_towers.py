"""A model of two graphs, which share a weight and the names of inputs and outputs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.helpers.nets import adapter_for
from tpeft_deploy import Adapter, Bundle, Component, export_bundle
from tpeft_deploy.tucker import Array

SIZES = {"image": 6, "text": 5}  # component -> size of its input


class Towers(nn.Module):
    """Two towers, each with a head; `shared.weight` is in both."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(6, 8)
        self.text = nn.Linear(5, 8)
        self.shared = nn.Linear(8, 8)
        self.image_head = nn.Linear(8, 3)
        self.text_head = nn.Linear(8, 4)


class ImageTower(nn.Module):
    """(B, 6) -> (B, 3)."""

    def __init__(self, whole: Towers) -> None:
        super().__init__()
        self.image, self.shared, self.image_head = whole.image, whole.shared, whole.image_head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.image_head(torch.tanh(self.shared(torch.tanh(self.image(x)))))}


class TextTower(nn.Module):
    """(B, 5) -> (B, 4)."""

    def __init__(self, whole: Towers) -> None:
        super().__init__()
        self.text, self.shared, self.text_head = whole.text, whole.shared, whole.text_head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.text_head(torch.relu(self.shared(torch.sin(self.text(x)))))}


TOWERS = {"image": ImageTower, "text": TextTower}


def towers() -> Towers:
    torch.manual_seed(7)
    return Towers().eval()


def inputs(component: str, rows: int, seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((rows, SIZES[component])).astype(np.float32)}


def adapters() -> dict[str, Adapter]:
    """Of different ranks: one in both graphs, two in one graph only, one with a head of another size in both."""
    whole = towers()
    shared, image, text = "shared.weight", "image.weight", "text.weight"
    heads = {f"{own}_head.{part}": shape for own in SIZES for part, shape in (("weight", (5, 8)), ("bias", (5,)))}
    return {
        "both": adapter_for(whole, {shared: (2, 2), image: (3, 3), text: (1, 1)}, seed=1),
        "seeing": adapter_for(whole, {image: (4, 4)}, seed=2),
        "reading": adapter_for(whole, {text: (2, 2)}, seed=3),
        "heads": adapter_for(whole, {shared: (1, 1)}, seed=4, overrides=heads),
    }


def expected(component: str, adapter: Adapter | None, given: dict[str, Array]) -> Array:
    """The scores of the torch module with an adapter merged into its weights."""
    whole = copy.deepcopy(towers())
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, delta in (adapter.deltas if adapter else {}).items():
            weights[name].data += torch.from_numpy(delta.dense().astype(np.float32))
        for name, array in (adapter.overrides if adapter else {}).items():
            weights[name].data = torch.from_numpy(array)
        scores: Array = TOWERS[component](whole)(torch.from_numpy(given["x"]))["scores"].numpy()
    return scores


def bundle(path: Path) -> Bundle:
    """A bundle of both towers with all adapters."""
    whole = towers()
    parts = {
        own: Component(tower(whole).eval(), {"x": torch.from_numpy(inputs(own, 2)["x"])})
        for own, tower in TOWERS.items()
    }
    return export_bundle(parts, adapters(), path)

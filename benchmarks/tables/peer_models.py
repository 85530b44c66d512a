"""The models that toolkits are compared on, their LoRA adapters as PEFT wrote them, and the bundle of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks.runtime import Encoder
from tpeft_deploy import Bundle, export_bundle, export_folded, load_adapter
from tpeft_deploy.tucker import Array

__all__ = ["RANK", "SMALLEST", "WORKS", "Size", "Work"]

RANK = 8
WORDS, PIXELS, FEATURES = 1000, 32, 64


@dataclass(frozen=True)
class Size:
    """How large the models are.

    Args:
        layers: layers of the encoder, and convolutions of the conv net.
        width: features of the encoder.
        channels: channels of the conv net.
        tasks: number of adapters.
        rows: rows of a batch.
    """

    layers: int = 6
    width: int = 384
    channels: int = 64
    tasks: int = 16
    rows: int = 16


SMALLEST = Size(layers=1, width=64, channels=8, tasks=3, rows=4)


class ConvNet(nn.Module):
    """Convolutions of 3 x 3 with batch normalisation, the second half of them on a quarter of the pixels."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(size.layers):
            come = size.channels if number else 3
            stride = 2 if number == size.layers // 2 else 1
            layers += [nn.Conv2d(come, size.channels, 3, padding=1, stride=stride, bias=False)]
            layers += [nn.BatchNorm2d(size.channels), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(size.channels, 100)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(pixel_values).mean((2, 3)))
        return found


def _classifier(size: Size) -> nn.Module:
    del size
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32))


def _encoder(size: Size) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        intermediate_size=4 * size.width,
    )
    return Encoder(BertForSequenceClassification(config)).eval()


def _texts(rows: int, tokens: int) -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(0, WORDS, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones((rows, tokens), np.int64)}


def _images(rows: int, tokens: int) -> dict[str, Array]:
    del tokens
    return {"pixel_values": np.random.default_rng(0).standard_normal((rows, 3, PIXELS, PIXELS)).astype(np.float32)}


def _features(rows: int, tokens: int) -> dict[str, Array]:
    del tokens
    return {"input": np.random.default_rng(0).standard_normal((rows, FEATURES)).astype(np.float32)}


@dataclass(frozen=True)
class Kind:
    """An architecture, what is adapted in it, and its inputs.

    Args:
        make: the model of a size.
        layers: modules that have LoRA, by the ends of their names.
        inputs: inputs of so many rows of so many tokens.
        free: axes of the inputs that are not fixed.
    """

    make: Callable[[Size], nn.Module]
    layers: tuple[str, ...]
    inputs: Callable[[int, int], dict[str, Array]]
    free: Mapping[str, dict[int, str]]


KINDS = {
    "encoder": Kind(
        _encoder,
        ("query", "key", "value", "dense", "classifier"),
        _texts,
        {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")},
    ),
    "conv net": Kind(
        ConvNet,
        (*(str(index) for index in range(0, 300, 3)), "head"),
        _images,
        {"pixel_values": {0: "batch"}},
    ),
    "classifier": Kind(_classifier, ("0", "2"), _features, {"input": {0: "batch"}}),
}
# Name in the table -> architecture and tokens of a row.
WORKS = {
    "encoder, 8 tokens": ("encoder", 8),
    "encoder, 64 tokens": ("encoder", 64),
    "conv net": ("conv net", 0),
}


class Work:
    """A model with adapters, in every form that a toolkit wants it in; all of them stay in the cache.

    Args:
        cache: directory of models.
        kind: key of `KINDS`.
        size: size of the model.
    """

    def __init__(self, cache: Path, kind: str, size: Size) -> None:
        self.kind, self.size = KINDS[kind], size
        self.tasks = [f"task-{number}" for number in range(size.tasks)]
        parts = [kind.replace(" ", "-"), size.layers, size.width, size.channels, size.tasks]
        self.place = cache / "peers" / "-".join(map(str, parts))

    def base(self) -> nn.Module:
        """The model without adapters; the same weights each time."""
        torch.manual_seed(0)
        return self.kind.make(self.size).eval()

    def inputs(self, tokens: int, rows: int | None = None) -> dict[str, Array]:
        return self.kind.inputs(rows or self.size.rows, tokens)

    @cached_property
    def peft(self) -> PeftModel:
        """The model with all adapters, as PEFT loads them."""
        first, *others = self.tasks
        if not (self.place / "adapters" / self.tasks[-1]).is_dir():
            self._write_adapters()
        adapters = self.place / "adapters"
        model = PeftModel.from_pretrained(self.base(), str(adapters / first), adapter_name=first)
        for task in others:
            model.load_adapter(str(adapters / task), adapter_name=task)
        return model.eval()

    def _write_adapters(self) -> None:
        for seed, task in enumerate(self.tasks):
            base = self.base()
            torch.manual_seed(seed + 1)
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(self.kind.layers), init_lora_weights=False)
            get_peft_model(base, config).save_pretrained(str(self.place / "adapters" / task))

    def merged(self, task: str) -> nn.Module:
        """A model with the weights of one adapter added to its weights."""
        adapted = PeftModel.from_pretrained(self.base(), str(self.adapter(task)))
        found: nn.Module = adapted.merge_and_unload().eval()
        return found

    def adapter(self, task: str) -> Path:
        """PEFT's directory of an adapter."""
        _ = self.peft
        return self.place / "adapters" / task

    @cached_property
    def bundle(self) -> Bundle:
        path = self.place / "bundle"
        if not (path / "manifest.json").is_file():
            base = self.base()
            adapters = {task: load_adapter(self.adapter(task), base=base) for task in self.tasks}
            export_bundle(base, adapters, path, max_rank=RANK, **self._sizes())
        return Bundle.open(path)

    def folded(self, tasks: Sequence[str]) -> list[Path]:
        """ONNX files of models with one adapter each in their weights."""
        paths = []
        for task in tasks:
            path = self.place / "folded" / f"{task}.onnx"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                base = self.base()
                export_folded(base, load_adapter(self.adapter(task), base=base), path, task=task, **self._sizes())
            paths.append(path)
        return paths

    def _sizes(self) -> dict[str, Any]:
        inputs = {name: torch.from_numpy(array) for name, array in self.inputs(8, 2).items()}
        return {"example_inputs": inputs, "dynamic_shapes": copy.deepcopy(dict(self.kind.free))}

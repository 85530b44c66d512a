"""LyCORIS as an oracle: a .safetensors file loaded onto the base by LyCORIS, its modules not merged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

__all__ = ["DISTRIBUTION", "load"]

DISTRIBUTION = "lycoris-lora"
_PREFIXES = ("lycoris", "lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer")
_ALPHA = ".alpha"  # a number that LyCORIS takes in and need not hold: two whole factors of LoKr have no scale
_TOLERANCE = 1e-3  # some modules hold W + dW, and give back dW with its rounding


def load(model: nn.Module, path: Path) -> Callable[..., object]:
    """The forward method of a base that LyCORIS has given the modules of a file.

    Args:
        model: the base; LyCORIS changes its layers.
        path: the file.

    Raises:
        ImportError: LyCORIS is not installed.
        ValueError: LyCORIS does not account for every module and tensor of the file.
        Exception: whatever LyCORIS raises for a file or a base that it cannot take.
    """
    from lycoris import create_lycoris_from_weights
    from safetensors.torch import load_file

    tensors = load_file(path)
    with _named(_prefix(tensors)):
        network, _ = create_lycoris_from_weights(1.0, str(path), model, weights_sd=tensors)
    made = {lora.lora_name for lora in network.loras if not lora.not_supported}
    for key in sorted(tensors):
        if key.partition(".")[0] not in made:
            raise ValueError(f"it makes no module of tensor {key!r}")
    network.apply_to()
    _check_held(tensors, network.state_dict())
    network.eval()
    return model.eval()


def _prefix(tensors: Mapping[str, torch.Tensor]) -> str:
    """Prefix of every module's name in a file; LyCORIS reads one prefix at a time."""
    for prefix in _PREFIXES:
        if all(key.startswith(f"{prefix}_") for key in tensors):
            return prefix
    raise ValueError(f"its names do not all begin with one of {', '.join(_PREFIXES)}: {min(tensors, default='none')!r}")


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    """Let LyCORIS look for modules under a prefix, and keep its log to itself: its settings are those of a class."""
    from lycoris import LycorisNetwork
    from lycoris.logging import logger

    own, level = LycorisNetwork.LORA_PREFIX, logger.level
    LycorisNetwork.LORA_PREFIX = prefix
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LycorisNetwork.LORA_PREFIX = own
        logger.setLevel(level)


def _check_held(tensors: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Refuse a file of which LyCORIS holds another reading: what it would save again must be what it was given."""
    for key, tensor in sorted(tensors.items()):
        own = held.get(key)
        if key.endswith(_ALPHA):
            continue
        size = float(tensor.abs().max()) if tensor.numel() else 0.0
        if own is None or own.shape != tensor.shape:
            raise ValueError(f"it makes {'nothing' if own is None else tuple(own.shape)} of tensor {key!r}")
        if not torch.allclose(own.double(), tensor.double(), rtol=0, atol=_TOLERANCE * size):
            raise ValueError(f"it holds other values than those of tensor {key!r}")

"""Data of the quickstart: scikit-learn's handwritten digits, and a transformation per task.

Every image is float32 in [0, 1], (1, 16, 16): the 8x8 scans of scikit-learn, enlarged.  The held-out digits are the
same for every task, and are used in no training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DIGITS", "SIZE", "TASKS", "Digits", "Labels", "Pixels", "DigitTask", "load_digits"]

SIZE = 16
DIGITS = tuple("0123456789")
_NOISE = 0.15
_HELD_OUT = 0.25

Pixels = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Digits:
    """Images with their labels.

    Args:
        pixels: (N, 1, 16, 16) float32 in [0, 1].
        labels: (N,) int64.
    """

    pixels: Pixels
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DigitTask:
    """One task: a transformation of the upright digits.

    Args:
        name: name of the task in the bundle.
        about: short description of the transformation.
        change: (upright digits, random numbers) -> images and labels of the task.
        answers: meaning of each label.
    """

    name: str
    about: str
    change: Callable[[Digits, np.random.Generator], Digits]
    answers: tuple[str, ...] = DIGITS

    @property
    def shares_head(self) -> bool:
        """Whether the task uses the base's head; otherwise its adapter replaces the head."""
        return self.answers == DIGITS

    def examples(self, digits: Digits, seed: int) -> Digits:
        """Transform upright digits; the same seed gives the same images."""
        return self.change(digits, np.random.default_rng(seed))


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """Load upright digits, (train, test): a quarter is held out, stratified by digit."""
    from sklearn.datasets import load_digits as load_bundled
    from sklearn.model_selection import train_test_split

    bundled = load_bundled()
    pixels = _enlarge(bundled.images.astype(np.float32) / 16.0)[:, None]
    labels = bundled.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=_HELD_OUT, random_state=seed, stratify=labels)
    return Digits(pixels[train], labels[train]), Digits(pixels[test], labels[test])


def _enlarge(images: Pixels) -> Pixels:
    """Enlarge (N, 8, 8) to (N, 16, 16), bilinearly."""
    old = images.shape[-1]
    centres = np.clip((np.arange(SIZE) + 0.5) * old / SIZE - 0.5, 0, old - 1)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old))).astype(np.float32)
    enlarged: Pixels = weights @ images @ weights.T
    return enlarged


def _rotated(digits: Digits, random: np.random.Generator) -> Digits:
    return Digits(np.ascontiguousarray(np.rot90(digits.pixels, axes=(2, 3))), digits.labels)


def _inverted(digits: Digits, random: np.random.Generator) -> Digits:
    noise = random.normal(0, _NOISE, digits.pixels.shape)
    return Digits(np.clip(1 - digits.pixels + noise, 0, 1).astype(np.float32), digits.labels)


def _mirrored(digits: Digits, random: np.random.Generator) -> Digits:
    return Digits(np.ascontiguousarray(digits.pixels[..., ::-1]), digits.labels)


def _shifted(digits: Digits, random: np.random.Generator) -> Digits:
    return Digits(np.roll(digits.pixels, SIZE // 2, axis=3), digits.labels)


def _upright(digits: Digits, random: np.random.Generator) -> Digits:
    turned = random.permutation(len(digits)) % 2
    pixels = np.where(turned[:, None, None, None] == 1, digits.pixels[..., ::-1, ::-1], digits.pixels)
    return Digits(pixels, turned.astype(np.int64))


TASKS: tuple[DigitTask, ...] = (
    DigitTask("rotated", "turned by 90 degrees", _rotated),
    DigitTask("inverted", "dark on light, with noise", _inverted),
    DigitTask("mirrored", "left and right exchanged", _mirrored),
    DigitTask("shifted", "by half the width", _shifted),
    DigitTask("upright", "up or down? a new head", _upright, answers=("up", "down")),
)

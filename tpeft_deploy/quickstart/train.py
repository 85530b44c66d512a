"""Training of the quickstart with PEFT: the base, then one tensor adapter per task."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.quickstart.data import TASKS, Digits, DigitTask
from tpeft_deploy.quickstart.model import DigitsNet
from tpeft_deploy.training import TuckerConfig

__all__ = ["TARGETS", "Recipe", "Trained", "merged", "train_adapter", "train_all", "train_base"]

# Every kind of weight that a convolutional adapter can change: full, depthwise and strided convolutions, and linears.
TARGETS = ("stem", "depthwise", "expand", "reduce", "downsample")

_BATCH = 64
_Change = Callable[[Digits, np.random.Generator], Digits]


@dataclass(frozen=True)
class Recipe:
    """Training length and learning rate.

    Args:
        steps: number of batches of 64.
        rate: maximum learning rate.
        decay: decoupled weight decay.
    """

    steps: int
    rate: float
    decay: float

    def scaled(self, effort: float) -> Recipe:
        """Multiply the number of steps by a factor; at least two steps."""
        return Recipe(max(2, round(self.steps * effort)), self.rate, self.decay)


@dataclass(frozen=True, eq=False)
class Trained:
    """Result of the training.

    Args:
        base: base in eval mode.
        adapters: task -> PEFT model in eval mode.
        seconds: task, or `base` -> seconds of training.
    """

    base: DigitsNet
    adapters: dict[str, PeftModel]
    seconds: dict[str, float]


BASE_RECIPE = Recipe(steps=450, rate=6e-3, decay=0.05)
ADAPTER_RECIPE = Recipe(steps=450, rate=5e-3, decay=0.01)


def train_base(digits: Digits, *, seed: int, recipe: Recipe = BASE_RECIPE) -> DigitsNet:
    """Train the base on upright digits.

    Args:
        digits: training split.
        seed: seed of the weights and of the order of the images.
        recipe: training length and learning rate.

    Returns:
        The base in eval mode, with contiguous weights.
    """
    with _reproducible(seed):
        base = DigitsNet()
        _fit(base, _batches(digits, _as_they_are, recipe.steps, seed), recipe)
    return base


def train_adapter(
    base: DigitsNet, task: DigitTask, digits: Digits, *, seed: int, recipe: Recipe = ADAPTER_RECIPE
) -> PeftModel:
    """Train one task's adapter on a copy of the base.

    Args:
        base: trained base; not modified.
        task: task to train; one with other classes than the base gets a new head.
        digits: training split, upright.
        seed: seed of the factors and of the order of the images.
        recipe: training length and learning rate.

    Returns:
        The PEFT model in eval mode.
    """
    with _reproducible(seed):
        model = copy.deepcopy(base)
        if not task.shares_head:
            model.head = nn.Linear(model.head.in_features, len(task.answers))
        config = TuckerConfig(
            ranks=8,
            # Rotated images need every depthwise kernel rotated separately: a change of high rank.
            rank_pattern={"depthwise": 24},
            scale=4.0,
            target_modules=list(TARGETS),
            modules_to_save=None if task.shares_head else ["head"],
        )
        adapted = cast(PeftModel, get_peft_model(model, config))
        _fit(adapted, _batches(digits, task.change, recipe.steps, seed), recipe)
    return adapted


def train_all(digits: Digits, *, seed: int, effort: float, on_stage: Callable[[str], None]) -> Trained:
    """Train the base, then the adapter of every task.

    Args:
        digits: training split, upright.
        seed: seed of all random numbers.
        effort: factor of the number of steps.
        on_stage: function that is called with each stage as it begins.
    """
    on_stage(f"train the base on {len(digits)} upright digits")
    begin = time.perf_counter()
    base = train_base(digits, seed=seed, recipe=BASE_RECIPE.scaled(effort))
    seconds = {BASE_TASK: time.perf_counter() - begin}
    adapters = {}
    for task in TASKS:
        on_stage(f"train the adapter {task.name}")
        begin = time.perf_counter()
        adapters[task.name] = train_adapter(base, task, digits, seed=seed, recipe=ADAPTER_RECIPE.scaled(effort))
        seconds[task.name] = time.perf_counter() - begin
    return Trained(base, adapters, seconds)


def merged(adapted: PeftModel) -> nn.Module:
    """Copy a PEFT model to a plain module with the adapter merged into its weights."""
    return cast(nn.Module, copy.deepcopy(adapted).merge_and_unload().eval())


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Set torch's seed and a single thread; restore both at the end.

    With one thread the weights do not depend on the number of cores; a network this small is hardly slower.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _fit(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.2)
    # Depthwise convolutions on a CPU are fastest in channels-last layout: training takes half the time.
    _lay_out(model.train(), torch.channels_last)
    for pixels, labels in batches:
        loss = nn.functional.cross_entropy(model(pixels=pixels)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    _lay_out(model.eval(), torch.contiguous_format)


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _batches(digits: Digits, change: _Change, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches, shuffled every epoch and shifted by up to a pixel before the task's transformation."""
    random = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < _BATCH:
            order = random.permutation(len(digits))
        chosen, order = order[:_BATCH], order[_BATCH:]
        nudged = np.roll(digits.pixels[chosen], random.integers(-1, 2, 2), axis=(2, 3))
        batch = change(Digits(nudged, digits.labels[chosen]), random)
        yield torch.from_numpy(batch.pixels), torch.from_numpy(batch.labels)


def _as_they_are(digits: Digits, random: np.random.Generator) -> Digits:
    return digits

"""Configuration of a tensor adapter, as saved in adapter_config.json."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

__all__ = ["PEFT_TYPE", "Ranks", "TuckerConfig", "mode_ranks"]

# Not "FLORA": that is also the name of a gradient compression method, which PEFT may add.
PEFT_TYPE = "TPEFT_TUCKER"

Ranks = int | float | list[int | float]


@dataclass
class TuckerConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a tensor adapter: dW = scale * G x_0 U_0 x_1 U_1 ... (FLoRA, arXiv 2405.14739, equation 6).

    Args:
        ranks: an int is the rank of the channel modes O and I; a float in (0, 1] is that fraction of the mode's
            size (at least 1); a list has one entry per mode of the weight as torch stores it: (O, I, K1, ...), for
            transposed convolutions and transformers' Conv1D (I, O, K1, ...).  Kernel modes that are not given keep
            their full size.  A mode of full rank has no factor.
        rank_pattern: module name (a suffix or a regular expression, as elsewhere in PEFT) -> `ranks` of that module.
        scale: factor of the change; it is not divided by a rank.
        dropout: probability of dropping an input of the branch (for an embedding: a value of the looked-up change).
        target_modules: names (suffixes) or one regular expression of the modules to adapt, or "all-linear".
        exclude_modules: names (suffixes) or one regular expression of modules to leave out.
        layers_to_transform: indices of the layers to adapt, when `target_modules` is a list.
        layers_pattern: name of the list that holds those layers.
        modules_to_save: modules that are trained and saved whole: a new head, norms.  BatchNorm layers that run in
            training mode update their statistics although the base is frozen: name them here, or keep them in eval
            mode; otherwise the adapter will not fit the base that it is later loaded on.
        ensure_weight_tying: as in PEFT's LoRA.  False adapts one module of a tied weight alone, with a warning; True
            gives all modules that use the weight (embedding and lm_head) the same adapter.
        init_weights: True initialises the core with zeros, so that dW = 0; False draws a small random core, for tests.
        base_digests: target weight -> `tpeft_deploy.adapter.weight_digest` of the base weight.  Set when the adapter
            is injected, and checked when it is loaded onto a base; leave it empty.

    Raises:
        ValueError: a field is out of its range.
    """

    ranks: Ranks = 8
    rank_pattern: dict[str, Ranks] = field(default_factory=dict)
    scale: float = 1.0
    dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    init_weights: bool = True
    base_digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.ranks = _checked_ranks(self.ranks, "ranks")
        self.rank_pattern = {
            pattern: _checked_ranks(ranks, f"rank_pattern[{_checked_pattern(pattern)!r}]")
            for pattern, ranks in self.rank_pattern.items()
        }
        self.scale = float(_checked_number(self.scale, "scale"))
        if not 0.0 <= _checked_number(self.dropout, "dropout") < 1.0:
            raise ValueError(f"TuckerConfig dropout: expected a number from 0 to below 1, got {self.dropout}")
        for name in ("init_weights", "ensure_weight_tying"):
            if getattr(self, name) not in {True, False}:
                raise ValueError(f"TuckerConfig {name}: expected True or False, got {getattr(self, name)!r}")
        if not all(isinstance(text, str) for pair in self.base_digests.items() for text in pair):
            raise ValueError("TuckerConfig base_digests: expected weight names and their digests, as PEFT saved them")
        self._check_selection()

    def _check_selection(self) -> None:
        # PEFT matches names against sets; a string is a regular expression.
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        indexed = self.layers_to_transform is not None or self.layers_pattern is not None
        if isinstance(self.target_modules, str) and indexed:
            raise ValueError(
                "TuckerConfig layers_to_transform and layers_pattern: expected a list as target_modules, got the "
                f"regular expression {self.target_modules!r}; put the layer numbers into it"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("TuckerConfig layers_pattern: expected layers_to_transform beside it, got None")

    def to_dict(self) -> dict[str, Any]:
        """Convert the fields to JSON values; sets are sorted, so that equal configurations give equal files."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def mode_ranks(ranks: Ranks, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Compute the rank of every mode of a weight; a mode with a rank equal to its size has no factor.

    Args:
        ranks: ranks as in `TuckerConfig`.
        shape: shape of the weight.

    Raises:
        ValueError: `ranks` has more entries than the weight has modes.
    """
    entries = ranks if isinstance(ranks, list) else [ranks] * 2
    if len(entries) > len(shape):
        raise ValueError(f"expected at most {len(shape)} ranks for a weight of shape {shape}, got {entries}")
    given = tuple(
        min(size, max(1, round(rank * size)) if isinstance(rank, float) else rank)
        for rank, size in zip(entries, shape, strict=False)
    )
    return given + shape[len(given) :]


def _checked_ranks(ranks: object, where: str) -> Ranks:
    if isinstance(ranks, list | tuple):
        if not ranks:
            raise ValueError(f"TuckerConfig {where}: expected at least one rank, got an empty list")
        return [_checked_rank(rank, f"{where}[{mode}]") for mode, rank in enumerate(ranks)]
    return _checked_rank(ranks, where)


def _checked_rank(rank: object, where: str) -> int | float:
    # bool is a subclass of int: ranks=True would mean rank 1.
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return rank
    if isinstance(rank, float) and 0.0 < rank <= 1.0:
        return rank
    raise ValueError(f"TuckerConfig {where}: expected a whole number from 1 or a fraction in (0, 1], got {rank!r}")


def _checked_number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"TuckerConfig {where}: expected a finite number, got {value!r}")
    return value


def _checked_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"TuckerConfig rank_pattern: {pattern!r} is not a regular expression ({error})") from error
    return pattern

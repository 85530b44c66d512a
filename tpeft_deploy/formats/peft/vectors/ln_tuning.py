"""LN tuning as PEFT saves it: a trained copy of each norm, which replaces that of the base (arXiv 2312.11420).

The parameters, and the statistics of a BatchNorm, are read as overrides.
"""

from __future__ import annotations

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-ln-tuning"
ABOUT = About("PEFT", "LN tuning", "norms", "no", "override", types=("LN_TUNING",))
_COPY = "ln_tuning_layers."
SUFFIXES = frozenset(
    f"{_COPY}{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)
matches = of_type("LN_TUNING", *SUFFIXES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The norm's tensors as overrides."""
    no_scale(module, checkpoint)
    found = {name.removeprefix(_COPY): module.tensors.pop(name) for name in SUFFIXES & module.tensors.keys()}
    return Change(overrides={f"{module.name}.{name}": tensor for name, tensor in found.items()})

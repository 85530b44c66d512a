"""BEFT as PEFT saves it: a change of a layer's bias, read as an override (arXiv 2509.15974).

b' = b + beft_bias (1, O)
"""

from __future__ import annotations

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import base_bias, of_type
from tpeft_deploy.formats.peft.dense import base_digest, misfit
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-beft"
ABOUT = About("PEFT", "BEFT", "biases of linear layers", "yes", "override", types=("BEFT",))
_BIAS = "beft_bias"
SUFFIXES = frozenset({_BIAS})
matches = of_type("BEFT", _BIAS)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's bias as an override.

    Raises:
        FormatError: no base was given, its layer has no bias, or the bias has another size.
    """
    no_scale(module, checkpoint)
    added = take(module, checkpoint, _BIAS)
    bias = base_bias(module, checkpoint, "BEFT adds to the base's bias")
    if bias is None:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a bias {module.name}.bias in the base, which BEFT adds to",
            got="a layer without one",
            fix="Give the layer a bias of zeros in the base, which changes no output.",
        )
    if added.shape != (1, *bias.shape):
        raise misfit(module, checkpoint, f"a tensor {(1, *bias.shape)}", added.shape)
    name = f"{module.name}.bias"
    return Change(
        overrides={name: (bias + added[0]).astype(widen(added[:0]).dtype)}, digests=base_digest(checkpoint, name)
    )

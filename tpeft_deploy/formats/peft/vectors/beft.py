"""BEFT as PEFT saves it: what is added to the bias of a layer (arXiv 2509.15974).

    b' = b + beft_bias (1, O)

The bias then stands in the adapter as a whole tensor.
"""

from __future__ import annotations

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import base_bias, is_type
from tpeft_deploy.formats.peft.dense import base_digest, misfit
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-beft"
ABOUT = About("PEFT", "BEFT", "biases of linear layers", "yes", "override", types=("BEFT",))
_BIAS = "beft_bias"
SUFFIXES = frozenset({_BIAS})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether a PEFT file of type BEFT has a bias for the module."""
    return is_type(checkpoint, "BEFT") and _BIAS in module.tensors


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's bias as an override.

    Raises:
        FormatError: no base was given, its layer has no bias, or one of another size.
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

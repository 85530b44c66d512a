"""The readers of modules, in the order in which they are asked; the first that matches reads the module.

The one place that a new format of modules is entered in.  A reader is a file with

    NAME                          the format's name, as `load_adapter(format=...)` takes it
    ABOUT                         what `tpeft-deploy formats` says of it
    SUFFIXES                      the exact suffixes of the tensors that it consumes
    matches(module, checkpoint)   whether the module's tensors are of this format
    read(module, checkpoint)      the module's Change, popping every tensor that it consumes

and, where there are any,

    JOINED_SUFFIXES               those of SUFFIXES that follow the module's name without a dot
    SHARED                        whole keys of tensors that several modules use, given as `checkpoint.shared`
    MAY_BE_EMPTY                  those of SUFFIXES that may be without values
    SHARED_PREFIXES               what such keys begin with; the reader adds those that it takes to `checkpoint.used`
"""

from __future__ import annotations

from typing import Protocol

from tpeft_deploy.formats import (
    flora_cr_mr,
    flora_loralib,
    flora_sjtu,
    kohya_lora,
    lycoris_full,
    lycoris_glora,
    lycoris_ia3,
    lycoris_loha,
    lycoris_lokr,
    lycoris_norm,
    lycoris_oft,
    lycoris_refusals,
    peft_adalora,
    peft_attention,
    peft_beft,
    peft_boft,
    peft_c3a,
    peft_deft,
    peft_delora,
    peft_experts,
    peft_fourierft,
    peft_frod,
    peft_glora,
    peft_gralora,
    peft_hira,
    peft_hra,
    peft_ia3,
    peft_ln_tuning,
    peft_loha,
    peft_lokr,
    peft_lora,
    peft_miss,
    peft_miss_bat,
    peft_oft,
    peft_osf,
    peft_peanut,
    peft_randlora,
    peft_road,
    peft_shira,
    peft_supertuning,
    peft_tinylora,
    peft_tokens,
    peft_unilora,
    peft_vblora,
    peft_vera,
    peft_waveft,
    plain_lora,
)
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.module import Change, Checkpoint, Module

__all__ = ["READERS", "WHOLE_MODEL", "Reader"]


class Reader(Protocol):
    """The verbs above, as a module of Python has them."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a constant of the module
        """The format's name."""

    @property
    def ABOUT(self) -> About:  # noqa: N802
        """What its user knows of it."""

    @property
    def SUFFIXES(self) -> frozenset[str]:  # noqa: N802
        """The exact suffixes that it consumes."""

    def matches(self, module: Module, checkpoint: Checkpoint) -> bool:
        """Whether the module's tensors are of this format."""

    def read(self, module: Module, checkpoint: Checkpoint) -> Change:
        """The module's change."""


READERS: tuple[Reader, ...] = (
    lycoris_refusals,
    flora_sjtu,
    flora_cr_mr,
    flora_loralib,
    peft_adalora,
    peft_attention,
    peft_experts,
    peft_lora,
    peft_loha,
    peft_lokr,
    peft_vera,
    peft_tinylora,
    peft_delora,
    peft_miss_bat,
    peft_miss,
    peft_ia3,
    peft_beft,
    peft_c3a,
    peft_fourierft,
    peft_gralora,
    peft_ln_tuning,
    peft_randlora,
    peft_shira,
    peft_supertuning,
    peft_tokens,
    peft_unilora,
    peft_vblora,
    peft_waveft,
    peft_oft,
    peft_boft,
    peft_hra,
    peft_hira,
    peft_road,
    peft_glora,
    peft_deft,
    peft_osf,
    peft_peanut,
    peft_frod,
    lycoris_oft,
    lycoris_loha,
    lycoris_lokr,
    lycoris_glora,
    lycoris_ia3,
    lycoris_norm,
    kohya_lora,
    plain_lora,
    lycoris_full,
)
WHOLE_MODEL = frozenset({flora_sjtu.NAME, flora_loralib.NAME})  # whose files hold the whole model's state

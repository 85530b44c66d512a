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

from tpeft_deploy.formats import kohya_lora, plain_lora
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.flora import cr_mr as flora_cr_mr
from tpeft_deploy.formats.flora import loralib as flora_loralib
from tpeft_deploy.formats.flora import sjtu as flora_sjtu
from tpeft_deploy.formats.lycoris import full as lycoris_full
from tpeft_deploy.formats.lycoris import glora as lycoris_glora
from tpeft_deploy.formats.lycoris import ia3 as lycoris_ia3
from tpeft_deploy.formats.lycoris import loha as lycoris_loha
from tpeft_deploy.formats.lycoris import lokr as lycoris_lokr
from tpeft_deploy.formats.lycoris import norm as lycoris_norm
from tpeft_deploy.formats.lycoris import oft as lycoris_oft
from tpeft_deploy.formats.lycoris import refusals as lycoris_refusals
from tpeft_deploy.formats.peft import attention as peft_attention
from tpeft_deploy.formats.peft import deft as peft_deft
from tpeft_deploy.formats.peft import experts as peft_experts
from tpeft_deploy.formats.peft import peanut as peft_peanut
from tpeft_deploy.formats.peft import shira as peft_shira
from tpeft_deploy.formats.peft import supertuning as peft_supertuning
from tpeft_deploy.formats.peft import tokens as peft_tokens
from tpeft_deploy.formats.peft.low_rank import adalora as peft_adalora
from tpeft_deploy.formats.peft.low_rank import delora as peft_delora
from tpeft_deploy.formats.peft.low_rank import glora as peft_glora
from tpeft_deploy.formats.peft.low_rank import gralora as peft_gralora
from tpeft_deploy.formats.peft.low_rank import lora as peft_lora
from tpeft_deploy.formats.peft.low_rank import miss as peft_miss
from tpeft_deploy.formats.peft.low_rank import miss_bat as peft_miss_bat
from tpeft_deploy.formats.peft.low_rank import randlora as peft_randlora
from tpeft_deploy.formats.peft.low_rank import tinylora as peft_tinylora
from tpeft_deploy.formats.peft.low_rank import unilora as peft_unilora
from tpeft_deploy.formats.peft.low_rank import vblora as peft_vblora
from tpeft_deploy.formats.peft.low_rank import vera as peft_vera
from tpeft_deploy.formats.peft.orthogonal import boft as peft_boft
from tpeft_deploy.formats.peft.orthogonal import hra as peft_hra
from tpeft_deploy.formats.peft.orthogonal import oft as peft_oft
from tpeft_deploy.formats.peft.orthogonal import road as peft_road
from tpeft_deploy.formats.peft.products import frod as peft_frod
from tpeft_deploy.formats.peft.products import hira as peft_hira
from tpeft_deploy.formats.peft.products import loha as peft_loha
from tpeft_deploy.formats.peft.products import lokr as peft_lokr
from tpeft_deploy.formats.peft.spectral import c3a as peft_c3a
from tpeft_deploy.formats.peft.spectral import fourierft as peft_fourierft
from tpeft_deploy.formats.peft.spectral import osf as peft_osf
from tpeft_deploy.formats.peft.spectral import waveft as peft_waveft
from tpeft_deploy.formats.peft.vectors import beft as peft_beft
from tpeft_deploy.formats.peft.vectors import ia3 as peft_ia3
from tpeft_deploy.formats.peft.vectors import ln_tuning as peft_ln_tuning
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module

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

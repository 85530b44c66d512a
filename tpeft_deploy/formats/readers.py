"""The readers of modules, in the order in which they are asked; the first that matches reads the module.

A new format of modules is entered here alone.
"""

from __future__ import annotations

from tpeft_deploy.formats import flora, kohya_lora, plain_lora
from tpeft_deploy.formats.lycoris import oft as lycoris_oft
from tpeft_deploy.formats.lycoris import products as lycoris_products
from tpeft_deploy.formats.lycoris import refusals as lycoris_refusals
from tpeft_deploy.formats.lycoris import whole as lycoris_whole
from tpeft_deploy.formats.peft import decompositions as peft_decompositions
from tpeft_deploy.formats.peft import lora as peft_lora
from tpeft_deploy.formats.peft import low_rank as peft_low_rank
from tpeft_deploy.formats.peft import orthogonal as peft_orthogonal
from tpeft_deploy.formats.peft import peanut as peft_peanut
from tpeft_deploy.formats.peft import products as peft_products
from tpeft_deploy.formats.peft import shared as peft_shared
from tpeft_deploy.formats.peft import sparse as peft_sparse
from tpeft_deploy.formats.peft import spectral as peft_spectral
from tpeft_deploy.formats.peft import tokens as peft_tokens
from tpeft_deploy.formats.peft import vectors as peft_vectors
from tpeft_deploy.formats.reader import FormatReader

__all__ = ["READERS", "WHOLE_MODEL"]

READERS: tuple[FormatReader, ...] = (
    lycoris_refusals.read_refusals,
    flora.read_sjtu,
    flora.read_cr_mr,
    flora.read_loralib,
    peft_low_rank.read_adalora,
    peft_lora.read_attention,
    peft_lora.read_experts,
    peft_lora.read_lora,
    peft_products.read_loha,
    peft_products.read_lokr,
    peft_shared.read_vera,
    peft_shared.read_tinylora,
    peft_low_rank.read_delora,
    peft_low_rank.read_miss_bat,
    peft_low_rank.read_miss,
    peft_vectors.read_ia3,
    peft_vectors.read_beft,
    peft_spectral.read_c3a,
    peft_spectral.read_fourierft,
    peft_low_rank.read_gralora,
    peft_vectors.read_ln_tuning,
    peft_shared.read_randlora,
    peft_sparse.read_shira,
    peft_sparse.read_supertuning,
    peft_tokens.read_tokens,
    peft_shared.read_unilora,
    peft_shared.read_vblora,
    peft_spectral.read_waveft,
    peft_orthogonal.read_oft,
    peft_orthogonal.read_boft,
    peft_orthogonal.read_hra,
    peft_products.read_hira,
    peft_orthogonal.read_road,
    peft_low_rank.read_glora,
    peft_decompositions.read_deft,
    peft_decompositions.read_osf,
    peft_peanut.read_peanut,
    peft_decompositions.read_frod,
    lycoris_oft.read_oft,
    lycoris_products.read_loha,
    lycoris_products.read_lokr,
    lycoris_products.read_glora,
    lycoris_whole.read_ia3,
    lycoris_whole.read_norm,
    kohya_lora.read_kohya_lora,
    plain_lora.read_plain_lora,
    lycoris_whole.read_full,
)
WHOLE_MODEL = frozenset({flora.read_sjtu.name, flora.read_loralib.name})  # their files hold the state of a whole model

"""Registration of the method with PEFT.

`register_peft_method` of PEFT accepts only names in its `PeftType` enum (huggingface/peft#2282), but every look-up
uses these dicts, by a string.  They are not documented API: a test detects changes.
"""

from __future__ import annotations

from typing import Any, cast

from peft import mapping

from tpeft_deploy.training.config import PEFT_TYPE, TuckerConfig
from tpeft_deploy.training.model import TuckerModel

__all__ = ["register"]


def register() -> None:
    """Insert the method into PEFT's look-up tables; idempotent."""
    key = cast(Any, PEFT_TYPE)
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = TuckerConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = TuckerModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = TuckerModel.prefix

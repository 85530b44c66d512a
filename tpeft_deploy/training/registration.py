"""Making the method known to PEFT.

PEFT's own `register_peft_method` takes only names of its `PeftType` enum (huggingface/peft#2282), but every look-up
goes through these dicts, by a string.  They are no documented API: a test pins them.
"""

from __future__ import annotations

from typing import Any, cast

from peft import mapping

from tpeft_deploy.training.config import PEFT_TYPE, TuckerConfig
from tpeft_deploy.training.model import TuckerModel

__all__ = ["register"]


def register() -> None:
    """Insert the method into PEFT's look-up tables; doing it again changes nothing."""
    key = cast(Any, PEFT_TYPE)
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = TuckerConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = TuckerModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = TuckerModel.prefix

"""Train tensor adapters with PEFT: importing this package registers the method under the type "TPEFT_TUCKER".

from peft import get_peft_model
from tpeft_deploy.training import TuckerConfig

model = get_peft_model(base, TuckerConfig(ranks=8, target_modules=["query", "value"]))
...
model.save_pretrained("adapter")
"""

from tpeft_deploy.errors import requires

with requires("peft and torch", "train", "import tpeft_deploy.training"):
    import peft  # noqa: F401
    import torch  # noqa: F401

from tpeft_deploy.training.config import PEFT_TYPE, TuckerConfig
from tpeft_deploy.training.kinds import (
    TuckerConv,
    TuckerConvTranspose,
    TuckerEmbedding,
    TuckerLinear,
    TuckerTransposedLinear,
)
from tpeft_deploy.training.layer import TuckerLayer
from tpeft_deploy.training.model import TuckerModel
from tpeft_deploy.training.registration import register

__all__ = [
    "PEFT_TYPE",
    "TuckerConfig",
    "TuckerConv",
    "TuckerConvTranspose",
    "TuckerEmbedding",
    "TuckerLayer",
    "TuckerLinear",
    "TuckerModel",
    "TuckerTransposedLinear",
]

register()

"""Generation of token sequences, each row with its adapter."""

from tpeft_deploy.runtime.generation.sampling import Sampling

__all__ = ["Sampling"]

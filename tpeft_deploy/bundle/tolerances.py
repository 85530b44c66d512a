"""Relative errors that an export is held to: exporters prove with them, the runtime compares folded sessions with them.

The error is ||export - reference|| / ||reference|| in the Frobenius norm.  A manifest states those of its bundle:
`tolerance` and `rounding` where they differ from `LIMITS`, and the limit of every comparison in `gate`.
"""

from __future__ import annotations

__all__ = ["BRANCH_SLACK", "LIMIT", "LIMITS", "ROUNDING_MULTIPLES", "TF32_LIMIT", "WIDEST_LIMIT", "WIDEST_TOLERANCE"]

LIMIT = 1e-5  # of weights in float32 and float64
LIMITS = {"bfloat16": 1.6e-2, "float16": 2e-3}  # of narrower weights; bfloat16 has 3 bits less than float16
TF32_LIMIT = LIMITS["float16"]  # its products have as many bits of the mantissa
WIDEST_TOLERANCE = 1e-3  # a missing branch of a small adapter may change no more than that

# Of 13 architectures the largest error of any form was, in float16, 3.8 times the rounding, of a ResNet (fused
# BatchNorms are rounded once more).  In bfloat16, where a copy in float32 runs, it was 1.5 times, of a rounded W + dW.
ROUNDING_MULTIPLES = {"float16": 4.0, "bfloat16": 2.0}
WIDEST_LIMIT = 0.1  # a wider limit would tell nothing: a missing branch changes less

# A graph in bfloat16 has its constants rounded, whatever its weights are; branches may add little to that.
BRANCH_SLACK = 4

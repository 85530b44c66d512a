"""What readers of one module's tensors take besides the tensors: the scale, and values of the base.

LyCORIS and kohya state one rule for every linear algorithm: dW is multiplied by alpha / rank, and by 1 where the file
has no alpha.  (rs_lora needs nothing: the file then holds alpha sqrt(rank).)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tpeft_deploy.errors import FormatError, ShapeError
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.tucker import Array

__all__ = ["base_array", "doing", "needs_base", "no_scale", "reporting", "take", "take_scale"]


def doing(module: Module, checkpoint: Checkpoint) -> str:
    """What an error about a module says was being done."""
    return f"read {checkpoint.source}, module {module.key!r}"


@contextmanager
def reporting(module: Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what algebra raises about shapes and values into a FormatError that names the module."""
    try:
        yield
    except (ShapeError, ValueError, IndexError) as error:
        raise FormatError(
            doing(module, checkpoint),
            problem=f"its tensors do not fit each other or the weight ({error})",
            fix="Check that the file is whole and was trained on this base.",
        ) from error


def take(module: Module, checkpoint: Checkpoint, suffix: str) -> Array:
    """Pop a tensor that the module's format cannot do without.

    Raises:
        FormatError: it is not there.
    """
    if suffix not in module.tensors:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a tensor {suffix}",
            got=f"only {', '.join(sorted(module.tensors)) or 'nothing'}",
            fix="The file is not whole: save or copy the adapter again.",
        )
    return module.tensors.pop(suffix)


def take_scale(module: Module, checkpoint: Checkpoint, rank: int) -> tuple[float, str | None]:
    """Pop alpha: the factor alpha / rank, and a note where the file has none.

    Without alpha the factor is what the caller gave as scale, else 1.

    Raises:
        FormatError: alpha is not one finite number, the rank is 0, or the caller gave a scale beside it.
    """
    alpha = module.tensors.pop("alpha", None)
    if alpha is None:
        if checkpoint.scale is not None:
            return checkpoint.scale, None
        return 1.0, "the file has no alpha, so the change is taken as it is, with scale 1"
    no_scale(module, checkpoint)
    if rank == 0:
        raise FormatError(doing(module, checkpoint), expected="a rank of at least 1", got="tensors of rank 0")
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise FormatError(
            doing(module, checkpoint),
            expected="one finite number as alpha",
            got=f"{alpha.reshape(-1)[:4].tolist()} of dtype {alpha.dtype}",
            fix="float16 ends at 65504: save the adapter again in float32, or with alpha equal to the rank.",
        )
    return float(alpha.reshape(())) / rank, None


def no_scale(module: Module, checkpoint: Checkpoint) -> None:
    """Refuse a scale that the caller gave for a module that states its own."""
    if checkpoint.scale is not None:
        raise FormatError(
            doing(module, checkpoint),
            expected="no scale, as the module states its own",
            got=f"scale={checkpoint.scale}",
            fix="Leave scale out.",
        )


def needs_base(module: Module, checkpoint: Checkpoint, why: str) -> FormatError:
    """The error of a reader that cannot do without the base."""
    return FormatError(
        doing(module, checkpoint),
        problem=f"{why} and no base was given",
        fix="Give base=, the model that the adapter was trained on.",
    )


def base_array(module: Module, checkpoint: Checkpoint, tensor: str, why: str) -> Array:
    """A parameter of the module in the base.

    Args:
        module: the module.
        checkpoint: its checkpoint.
        tensor: "weight" or "bias".
        why: purpose of the base, as a clause.

    Raises:
        FormatError: no base was given, or its module has no such parameter.
    """
    if checkpoint.base is None:
        raise needs_base(module, checkpoint, why)
    name = f"{module.name}.{tensor}"
    if name not in checkpoint.base.weights:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"{name!r} in {checkpoint.base.name}",
            got="no parameter of that name",
            fix="Check that the base is what the adapter was trained on.",
        )
    return checkpoint.base.weights[name]

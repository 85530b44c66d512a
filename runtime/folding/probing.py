"""Whether an adapter does anything: its outputs against the base's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpeft_deploy.errors import AdapterError
from tpeft_deploy.tucker import Array

__all__ = ["differs"]


def differs(base: Mapping[str, Array], outputs: Mapping[str, Array], *, task: str) -> bool:
    """Whether any output differs from the base's, in size or in any element.

    Args:
        base: the base's outputs.
        outputs: the task's, on the same inputs.
        task: its name, for the message.

    Raises:
        AdapterError: an output of the task is not finite where the base's is.
    """
    for name, array in outputs.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all() and np.isfinite(base[name]).all():
            raise AdapterError(
                f"probe task {task!r} on the bundle's example, output {name!r}",
                expected="finite numbers, as the base's",
                got=f"{int((~np.isfinite(array)).sum())} that are not, of {array.size}",
                fix="The adapter overflows the base's dtype, or was damaged in training.",
            )
    return any(
        not np.array_equal(array, base[name], equal_nan=np.issubdtype(array.dtype, np.floating))
        for name, array in outputs.items()
    )

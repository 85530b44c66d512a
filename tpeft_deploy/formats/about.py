"""Description of a format, for `tpeft-deploy formats` and docs/formats.md."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["About"]


class About(NamedTuple):
    """Description of a format for users.

    Args:
        library: library or tool that writes it.
        method: common name of the training method.
        layers: layer kinds that it changes.
        base: "no", "yes", or the case in which the base is needed to read it.
        stored: form of the change: low-rank, dense, gain or override.
        notes: conditions, such as options that files must be saved with.
        types: values of PEFT's `peft_type` that it covers.
    """

    library: str
    method: str
    layers: str
    base: str
    stored: str
    notes: str = ""
    types: tuple[str, ...] = ()

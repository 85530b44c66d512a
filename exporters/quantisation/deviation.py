"""Distance of a quantised base, as it is served, from the base in floating point."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.quantised import Deviation
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.tucker import Array

__all__ = ["measure_deviation"]


def measure_deviation(subject: Subject, file: Path, adapter: Adapter | None = None) -> dict[str, Deviation]:
    """Run a quantised graph on the example inputs, beside the base in floating point.

    Args:
        subject: base in floating point.
        file: quantised graph of the base, or of the base with the adapter merged into it.
        adapter: merged into the reference.

    Returns:
        Output in floating point -> its distance, the worst over the sizes that an export is proved at.
    """
    session = compare.open_session(file, served=True)
    logits = subject.base.decoder.logits if subject.base.decoder is not None else None
    found: dict[str, Deviation] = {}
    for sizes in subject.shapes:
        got, expected = compare.run(session, subject.inputs(sizes), {}), subject.reference(adapter, sizes)
        for name, reference in expected.items():
            if reference.dtype.kind != "f" or not reference.size or got[name].shape != reference.shape:
                continue
            own = _deviation(got[name], reference, tokens=name == logits)
            found[name] = _worse(found[name], own) if name in found else own
    return found


def _deviation(got: Array, expected: Array, *, tokens: bool) -> Deviation:
    rows = [np.atleast_2d(array).reshape(-1, array.shape[-1] if array.ndim else 1) for array in (got, expected)]
    mine, theirs = (array.astype(np.float64) for array in rows)
    sizes = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.divide((mine * theirs).sum(1), sizes, out=np.ones_like(sizes), where=sizes > 0)
    agreement = float((mine.argmax(1) == theirs.argmax(1)).mean()) if tokens else None
    return Deviation(compare.relative_error(got, expected), float(cosines.min()), agreement)


def _worse(one: Deviation, other: Deviation) -> Deviation:
    shares = [own.agreement for own in (one, other) if own.agreement is not None]
    return Deviation(max(one.error, other.error), min(one.cosine, other.cosine), min(shares, default=None))

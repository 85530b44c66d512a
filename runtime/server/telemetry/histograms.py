"""Histograms that the event loop counts in plain numbers; the objects of prometheus_client are made at scrape time."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

__all__ = ["Bins", "histogram"]


class Bins:
    """Histogram: counts by upper bound, and the sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add the counts to a family, under values of its labels."""
        counts = itertools.accumulate(self._counts.copy())
        names = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        family.add_metric(labels, list(zip(names, counts, strict=True)), self._sum)


def histogram(
    name: str, about: str, bins: Iterable[tuple[Sequence[str], Bins]], labels: Sequence[str] = ()
) -> HistogramMetricFamily:
    """Return the family of histograms.

    Args:
        name: name of the metric.
        about: description.
        bins: values of the labels, and the histogram, of each series.
        labels: names of the labels.
    """
    family = HistogramMetricFamily(name, about, labels=labels)
    for own, values in bins:
        values.add_to(family, own)
    return family

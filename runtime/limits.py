"""Bounds of runs, of requests, and of what waits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpeft_deploy.errors import RunError, TooLarge

__all__ = ["Limits"]

# Runs' worth of rows that a request with rows that depend on one another may have.
_ALONE = 4


@dataclass(frozen=True)
class Limits:
    """Bounds of batching.

    Attributes:
        max_rows: rows of one run; a request of more is cut into runs of at most as many where its rows are independent,
            and runs alone elsewhere.
        max_delay: seconds that a request may wait for company while nothing runs; never longer than the last run.
        max_queue_rows: rows that may wait; of more, the tenant with the most loses its newest request.
        max_waste: share of a batch's elements that may be padding.  At a half, a batch computes at most twice what
            its requests would alone, which is less than what joining saves where a run has a fixed cost
            (launches on a GPU, weights read from memory); 0 joins requests of equal sizes only.
        max_request_rows: rows of one request, of which one that has to run alone may have 4 runs' worth at most; None
            is no bound, and a queue that is empty takes a request of any size.
        max_run_elements: elements of the inputs of one run, padding not counted, and so of one row; None is no bound.
            A request that fills a run by its elements counts as `max_rows` rows in the queue, however few it has.

    Raises:
        RunError: a bound that nothing could keep.
    """

    max_rows: int = 32
    max_delay: float = 0.002
    max_queue_rows: int = 1024
    max_waste: float = 0.5
    max_request_rows: int | None = None
    max_run_elements: int | None = None

    def __post_init__(self) -> None:
        valid = {
            "max_rows": self.max_rows >= 1,
            "max_delay": 0 <= self.max_delay < math.inf,
            "max_queue_rows": self.max_queue_rows >= 1,
            "max_waste": 0 <= self.max_waste < 1,
            "max_request_rows": self.max_request_rows is None or self.max_request_rows >= 1,
            "max_run_elements": self.max_run_elements is None or self.max_run_elements >= 1,
        }
        for name, fine in valid.items():
            if not fine:
                raise RunError(
                    "set the limits of batching",
                    expected="max_delay from 0, max_waste from 0 to below 1, and the others from 1",
                    got=f"{name} = {getattr(self, name)!r}",
                )

    def size(self, rows: int, elements: float) -> int:
        """The rows that a request counts as in the queue: more than it has where they are large."""
        if self.max_run_elements is None or elements * self.max_rows <= rows * self.max_run_elements:
            return rows
        return math.ceil(elements * self.max_rows / self.max_run_elements)

    def rows_of_a_run(self, rows: int, elements: float) -> int:
        """The most rows of one run that rows of such a request may fill: at least 1, and at most max_rows."""
        if self.max_run_elements is None or elements * self.max_rows <= rows * self.max_run_elements:
            return self.max_rows
        return max(1, int(self.max_run_elements * rows / elements))

    def check(self, rows: int, elements: float, *, alone: bool) -> None:
        """Refuse a request that would hold the worker too long.

        Args:
            rows: number of rows of the request.
            elements: number of elements of its inputs.
            alone: whether it can only run as a whole.

        Raises:
            TooLarge: it has too many rows, or one run would have too many elements.
        """
        most = self.max_request_rows
        if most is not None and alone:
            most = min(most, _ALONE * self.max_rows)
        if most is not None and self.size(rows, elements) > most:
            raise TooLarge(
                f"queue a request of {rows} rows and {elements:.0f} elements",
                expected=f"at most {most} rows" + (" where rows depend on one another" if alone else ""),
                got=f"what counts as {self.size(rows, elements)}",
                fix="Send fewer rows at once, or raise max_request_rows.",
            )
        largest = elements if alone else elements / rows
        if self.max_run_elements is not None and largest > self.max_run_elements:
            raise TooLarge(
                f"queue a request of {rows} rows and {elements:.0f} elements",
                expected=f"at most {self.max_run_elements} elements {'in all' if alone else 'a row'}",
                got=f"{largest:.0f}",
                fix="Send shorter rows, or raise max_run_elements.",
            )

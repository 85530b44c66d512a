"""When a request waited and ran."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timing"]


@dataclass(slots=True)
class Timing:
    """Filled in while a request is on its way; seconds of `time.monotonic`.

    Attributes:
        arrived: when it was given to the runtime.
        began: when the run began that answered it; 0 until then.  Where several runs did, as long before `ended` as
            they took together.
        ended: when that run ended, or the last of several; 0 until then.
        rows: rows of that run, or of the largest, those of other requests included.
    """

    arrived: float
    began: float = 0.0
    ended: float = 0.0
    rows: int = 0

    def add(self, began: float, ended: float, rows: int) -> None:
        """Count one of several runs."""
        self.began, self.ended, self.rows = began - self.ran, ended, max(rows, self.rows)

    @property
    def queued(self) -> float:
        """Seconds that it waited for its run, its adapter's way to the device included."""
        return max(0.0, self.began - self.arrived) if self.began else 0.0

    @property
    def ran(self) -> float:
        """Seconds that its run took."""
        return max(0.0, self.ended - self.began) if self.ended else 0.0

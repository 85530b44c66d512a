"""Concurrency limit per key."""

from __future__ import annotations

from tpeft_deploy.errors import QuotaExceeded

__all__ = ["Concurrency"]

_RETRY_SECONDS = 1.0


class Concurrency:
    """Counts in-flight requests (or streams) per key; belongs to the event loop's thread.

    Args:
        most: maximum number in flight per key.
        what: noun for error messages.
    """

    def __init__(self, most: int = 256, what: str = "requests") -> None:
        self._most = most
        self._what = what
        self._of: dict[str, int] = {}  # only keys with requests in flight

    def used_by(self, key: str) -> int:
        """Return the number in flight for a key."""
        return self._of.get(key, 0)

    def one(self, key: str) -> _One:
        """Count one until the end of a `with` block; raises as `enter` does."""
        self.enter(key)
        return _One(self, key)

    def enter(self, key: str) -> None:
        """Count one in flight.

        Raises:
            QuotaExceeded: the key has reached its limit.
        """
        count = self._of.get(key, 0)
        if count >= self._most:
            raise QuotaExceeded(
                "take a request",
                expected=f"at most {self._most:,} {self._what} of a key at once",
                got="one more",
                fix="Send it again when others have ended.",
                retry_after=_RETRY_SECONDS,
            )
        self._of[key] = count + 1

    def leave(self, key: str) -> None:
        """Count one as finished."""
        left = self._of[key] - 1
        if left:
            self._of[key] = left
        else:
            del self._of[key]


class _One:
    __slots__ = ("_key", "_owner")

    def __init__(self, owner: Concurrency, key: str) -> None:
        self._owner = owner
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._owner.leave(self._key)

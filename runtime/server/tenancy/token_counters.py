"""Virtual token counters of waiting and departed members, and the initial counter of newcomers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["LATER", "Counted", "Counters"]

LATER = 2**62  # offset that puts a turn after all others
_KEPT = 64  # departed members kept, in addition to two per waiting member


class Counted:
    """A waiting member.

    Attributes:
        served: virtual token counter.
        stranger: whether the member has no known counter, as a newcomer.
        turn: tie-breaker, the smaller is next: members not served since they entered, then the least recently served.
    """

    def __init__(self) -> None:
        self.served = 0.0
        self.stranger = True
        self.turn = 0


Key = TypeVar("Key", bound=Hashable)
Member = TypeVar("Member", bound=Counted)


class Counters(Generic[Key, Member]):
    """Virtual token counters of the waiting members.

    Attributes:
        waiting: key -> member, the longest waiting first.
    """

    def __init__(self) -> None:
        self.waiting: dict[Key, Member] = {}
        self._away: dict[Key, float] = {}
        self._turns = 0
        self._least = 0.0  # smallest counter of the waiting members
        self._entry = 0.0  # initial counter of newcomers

    def enter(self, key: Key, member: Member) -> Member:
        """Add a waiting member with its known counter, lifted to the smallest counter of the waiting members."""
        known = self._away.pop(key, None)
        self._turns += 1
        member.turn = self._turns - LATER
        member.stranger = known is None
        member.served = max(self._least, self._entry if known is None else known)
        self.waiting[key] = member
        return member

    def charge(self, member: Member, cost: float) -> None:
        """Add the cost of a service to the counter of a waiting member."""
        self._turns += 1
        member.turn = self._turns
        if member.stranger:
            # An endless sequence of newcomers that all start at the smallest counter would starve the others.  So the
            # initial counter grows by the cost served to newcomers, divided by the number of waiting members.
            member.stranger = False
            self._entry = max(self._entry, self._least) + cost / len(self.waiting)
        member.served += cost

    def leave(self, key: Key) -> None:
        """Remove a waiting member; its counter is kept for its return, unless nothing was charged."""
        member = self.waiting.pop(key)
        if not member.stranger:
            self._away[key] = member.served

    def settle(self) -> None:
        """Update the smallest counter; call it after members were charged or left, before another enters."""
        if not self.waiting:
            # Without contention no member is owed anything: all restart as equals.
            self._away.clear()
            self._least = self._entry = 0.0
            return
        self._least = max(self._least, min(member.served for member in self.waiting.values()))
        if len(self._away) > 2 * len(self.waiting) + _KEPT:
            # Smaller counters would be lifted to the smallest on return, so they need not be kept.
            self._away = {key: served for key, served in self._away.items() if served > self._least}

    @property
    def remembered(self) -> int:
        """Number of kept counters of departed members."""
        return len(self._away)

"""Counters of service: who waits, what they and those who left were served, and where who comes begins."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["LATER", "Counted", "Counters"]

LATER = 2**62  # added to a turn, it is after all others
_KEPT = 64  # of those who left, beside two for each who waits


class Counted:
    """One that waits.

    Attributes:
        served: its counter.
        stranger: whether nothing is known of what it was served before.
        turn: of equals, the smaller is next: those that were not served since they came, then those served longest ago.
    """

    def __init__(self) -> None:
        self.served = 0.0
        self.stranger = True
        self.turn = 0


Key = TypeVar("Key", bound=Hashable)
Member = TypeVar("Member", bound=Counted)


class Counters(Generic[Key, Member]):
    """Those who wait, by counters of what they were served.

    Attributes:
        waiting: key -> who waits, the one that has waited longest first.
    """

    def __init__(self) -> None:
        self.waiting: dict[Key, Member] = {}
        self._away: dict[Key, float] = {}
        self._turns = 0
        self._least = 0.0  # the smallest counter of those who wait
        self._entry = 0.0  # where strangers begin

    def enter(self, key: Key, member: Member) -> Member:
        """Let one wait that did not, at its own counter or that of those who were served least."""
        known = self._away.pop(key, None)
        self._turns += 1
        member.turn = self._turns - LATER
        member.stranger = known is None
        member.served = max(self._least, self._entry if known is None else known)
        self.waiting[key] = member
        return member

    def charge(self, member: Member, cost: float) -> None:
        """Count what one is served that waits."""
        self._turns += 1
        member.turn = self._turns
        if member.stranger:
            # An endless row of strangers who all began at the smallest counter would starve all the others: so
            # strangers begin later by what was served to those before them, in equal parts for all who wait.
            member.stranger = False
            self._entry = max(self._entry, self._least) + cost / len(self.waiting)
        member.served += cost

    def leave(self, key: Key) -> None:
        """Let one wait no longer; its counter is known when it comes back, unless nothing was charged."""
        member = self.waiting.pop(key)
        if not member.stranger:
            self._away[key] = member.served

    def settle(self) -> None:
        """To be said after members were charged or left, before one enters."""
        if not self.waiting:
            # Nobody was kept from anything: all begin again as equals.
            self._away.clear()
            self._least = self._entry = 0.0
            return
        self._least = max(self._least, min(member.served for member in self.waiting.values()))
        if len(self._away) > 2 * len(self.waiting) + _KEPT:
            # Whoever was served less than that would be lifted to it: nothing to remember.
            self._away = {key: served for key, served in self._away.items() if served > self._least}

    @property
    def remembered(self) -> int:
        """How many are known that do not wait."""
        return len(self._away)

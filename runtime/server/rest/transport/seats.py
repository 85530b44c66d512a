"""Which connections there may be: a limit for all, one for each address, and a few spare ones for health checks."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

__all__ = ["SPARE", "Patience", "Seat", "Seats", "affordable"]

SPARE = 8
"""Connections beyond the limit that are read for a moment, as one of them may ask for health."""
_FILES = 20  # that stay free for adapters, databases and the pipes of processes that read uploads
_DRAIN = 64 << 20  # bytes a second of refused bodies, of all connections: reading them is work for nothing
_MOST = 1000
_LEAST = 4


@dataclass(frozen=True)
class Patience:
    """How many connections there may be, and how long each may take.

    Attributes:
        connections: open at once.
        per_address: the same for one client address, or one network of IPv6; 0: no limit.
        head_seconds: from the first byte of a request, or from the start of a connection, to the end of the head;
            also for a TLS handshake.
        stall_seconds: time for 64 KiB of a body, or of an answer.
        idle_seconds: time between an answer and the next request.
        spare_seconds: head_seconds of connections beyond the limit.
    """

    connections: int = _MOST
    per_address: int = 256
    head_seconds: float = 10.0
    stall_seconds: float = 10.0
    idle_seconds: float = 20.0
    spare_seconds: float = 2.0


class Seat:
    """The place of one connection, from its acceptance to its end.

    Args:
        address: client, as it is counted.
        spare: whether it is beyond the limits.

    Attributes:
        end: ends the connection at once.
    """

    __slots__ = ("address", "end", "spare")

    def __init__(self, address: str, spare: bool) -> None:
        self.address = address
        self.spare = spare
        self.end: Callable[[], object] = lambda: None


class Seats:
    """Counts connections.

    Where there is no room, one whose body was refused goes, else the one that has waited longest for a request; where
    there is none, the newcomer gets one of the spare seats, of which the oldest goes.

    Args:
        patience: limits.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.waiting: dict[Seat, None] = {}  # for a request, longest first
        self.refused: dict[Seat, None] = {}  # with a body that comes though it was refused
        self._taken: dict[Seat, None] = {}
        self._spare: dict[Seat, None] = {}
        self._of: dict[str, int] = {}
        self._drained = 0.0

    def __len__(self) -> int:
        """Return the number of connections, without spare ones."""
        return len(self._taken)

    def arrive(self, host: str) -> Seat:
        """Seat for a connection that was accepted.

        Args:
            host: client address.
        """
        address = _counted(host)
        own = self.patience
        if own.per_address and self._of.get(address, 0) >= own.per_address:
            mine = (seat for seat in chain(self.refused, self.waiting) if seat.address == address)
            room = self._evict(next(mine, None))
        elif len(self._taken) >= own.connections:
            room = self._evict(next(chain(self.refused, self.waiting), None))
        else:
            room = True
        seat = Seat(address, spare=not room)
        if seat.spare:
            if len(self._spare) >= SPARE:
                self._evict(next(iter(self._spare)))
            self._spare[seat] = None
        else:
            self._taken[seat] = self.waiting[seat] = None
            self._of[address] = self._of.get(address, 0) + 1
        return seat

    def drain(self, size: int, now: float) -> float:
        """Seconds to wait before more is read of a body that was refused.

        Args:
            size: bytes that were read of it.
            now: time in seconds, of any clock.
        """
        begin = max(self._drained, now)
        self._drained = begin + size / _DRAIN
        return begin - now

    def leave(self, seat: Seat) -> None:
        """Give a seat back; a second time does nothing."""
        self._spare.pop(seat, None)
        self.waiting.pop(seat, None)
        self.refused.pop(seat, None)
        if seat in self._taken:
            del self._taken[seat]
            left = self._of.pop(seat.address) - 1
            if left:
                self._of[seat.address] = left

    def _evict(self, seat: Seat | None) -> bool:
        if seat is None:
            return False
        self.leave(seat)
        seat.end()
        return True


def affordable(protocols: int) -> int:
    """Connections that open files allow for each of some protocols, 1000 at most."""
    try:
        import resource
    except ImportError:  # Windows, where there is no such limit
        return _MOST
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return _MOST
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:
        used = 2 * _FILES
    return max(_LEAST, min(_MOST, (files - used - _FILES - SPARE) // protocols))


def _counted(host: str) -> str:
    """Address that is counted: of IPv6 the network, as a client has all addresses of it."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
    return host

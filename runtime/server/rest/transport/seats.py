"""Connection limits: a total, one per client address, and a few spare connections for health checks."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

__all__ = ["SPARE", "Patience", "Seat", "Seats", "affordable"]

SPARE = 8
"""Connections beyond the limit that are read briefly, as one of them may be a health check."""
_FILES = 20  # reserved for adapters, databases and the pipes of processes that read uploads
_DRAIN = 64 << 20  # bytes per second of refused bodies, of all connections: reading them is wasted work
_MOST = 1000
_LEAST = 4


@dataclass(frozen=True)
class Patience:
    """Limits on the number of connections, and timeouts of each.

    Attributes:
        connections: maximum open connections.
        per_address: maximum open connections per client address or IPv6 network; 0 means no limit.
        head_seconds: seconds from the first byte of a request, or the start of a connection, to the end of the head;
            also the limit of a TLS handshake.
        stall_seconds: seconds for 64 KiB of a body or a response.
        idle_seconds: seconds between a response and the next request.
        spare_seconds: head_seconds of connections beyond the limit.
    """

    connections: int = _MOST
    per_address: int = 256
    head_seconds: float = 10.0
    stall_seconds: float = 10.0
    idle_seconds: float = 20.0
    spare_seconds: float = 2.0


class Seat:
    """Slot of one connection, from its acceptance to its end.

    Args:
        address: client address as it is counted.
        spare: whether the connection is beyond the limits.

    Attributes:
        end: closes the connection at once.
    """

    __slots__ = ("address", "end", "spare")

    def __init__(self, address: str, spare: bool) -> None:
        self.address = address
        self.spare = spare
        self.end: Callable[[], object] = lambda: None


class Seats:
    """Admission control of connections.

    At the limit the eviction victim is a connection with a refused body, else the one that has waited longest for a
    request.  Without a victim the new connection gets a spare seat; if none is free, the oldest is evicted.

    Args:
        patience: limits and timeouts.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.waiting: dict[Seat, None] = {}  # waiting for a request, longest first
        self.refused: dict[Seat, None] = {}  # still sending a refused body
        self._taken: dict[Seat, None] = {}
        self._spare: dict[Seat, None] = {}
        self._of: dict[str, int] = {}
        self._drained = 0.0

    def __len__(self) -> int:
        """Return the number of connections, without spare ones."""
        return len(self._taken)

    def arrive(self, host: str) -> Seat:
        """Return a seat for an accepted connection.

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
        """Return the seconds to wait before reading more of a refused body.

        Args:
            size: bytes of the body just read.
            now: time of a monotonic clock in seconds.
        """
        begin = max(self._drained, now)
        self._drained = begin + size / _DRAIN
        return begin - now

    def leave(self, seat: Seat) -> None:
        """Release a seat; idempotent."""
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
    """Return the connections per protocol that the open-file limit allows, at most 1000."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
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
    """Return the address to count: for IPv6 the network, as a client controls all its addresses."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
    return host

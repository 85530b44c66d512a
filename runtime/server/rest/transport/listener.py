"""HTTP server: accepts connections within the limits, and checks their time limits each second."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from tpeft_deploy.runtime.server.rest.transport.connection import Connection
from tpeft_deploy.runtime.server.rest.transport.seats import Patience, Seat, Seats

__all__ = ["HttpServer"]

_log = logging.getLogger("tpeft_deploy.server")
_SWEEP_SECONDS = 1.0
_RETRY_SECONDS = 0.1


class HttpServer(uvicorn.Server):
    """uvicorn's server with limits on connections.

    Args:
        config: uvicorn configuration.
        patience: limits on connections.

    Attributes:
        tls: TLS context of new connections; None for plain text.
    """

    def __init__(self, config: uvicorn.Config, patience: Patience) -> None:
        super().__init__(config)
        self.tls: ssl.SSLContext | None = None
        self.seats = Seats(patience)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers: `serving` controls the order of shutdown."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting connections."""
        self.servers = [_Listener(self, listener) for listener in sockets or []]  # type: ignore[misc]  # as it is used
        self.started = True

    async def main_loop(self) -> None:
        """Check the time limits of connections until the server is told to stop."""
        sweeping = asyncio.create_task(self._sweep())
        try:
            await super().main_loop()
        except BaseException:
            sweeping.cancel()
            raise
        self._sweeping = sweeping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and wait for in-flight requests."""
        try:
            await super().shutdown(sockets)
        finally:
            self._sweeping.cancel()

    async def _sweep(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for connection in list(self.server_state.connections):
                try:
                    connection.look(now())  # type: ignore[union-attr]  # all are `Connection`
                except Exception:  # a failing connection must not affect the others
                    _log.exception("cannot look after a connection")


class _Listener:
    """Acceptor of connections of one socket, with the part of `asyncio.Server` that uvicorn uses."""

    def __init__(self, server: HttpServer, listener: socket.socket) -> None:
        self._server = server
        listener.setblocking(False)
        self._connecting: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:  # client disconnected, or out of file descriptors
                _log.warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            seat = self._server.seats.arrive(address[0])
            task = loop.create_task(self._connect(connection, seat))
            seat.end = task.cancel
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket, seat: Seat) -> None:
        server, patience = self._server, self._server.seats.patience
        seconds = patience.spare_seconds if seat.spare else patience.head_seconds
        loop = asyncio.get_running_loop()

        def made() -> Connection:
            return Connection(
                server.seats, seat, config=server.config, server_state=server.server_state, app_state={}, _loop=loop
            )

        tls = server.tls
        try:
            async with asyncio.timeout(seconds):
                await loop.connect_accepted_socket(
                    made, connection, ssl=tls, ssl_handshake_timeout=seconds if tls else None
                )
        except (OSError, TimeoutError):  # TLS handshake failed or timed out, or client disconnected
            server.seats.leave(seat)
            connection.close()
        except asyncio.CancelledError:
            server.seats.leave(seat)
            connection.close()
            raise

    def close(self) -> None:
        """Stop accepting connections."""
        for task in (self._accepting, *self._connecting):
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until accepting has stopped."""
        with suppress(asyncio.CancelledError):
            await self._accepting

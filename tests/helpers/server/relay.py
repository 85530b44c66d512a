"""A port that leads to another, for as long as a test says so."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Relay:
    """Connections to `port` are led to another port between `open` and `cut`.

    Args:
        port: port to listen on.
        target: port of the server.
    """

    def __init__(self, port: int, target: int) -> None:
        self._port = port
        self._target = target
        self._listener: socket.socket | None = None
        self._ends: list[socket.socket] = []

    def open(self) -> None:
        """Begin to take connections."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse connections, and end those there are."""
        for own in [self._listener, *self._ends]:
            if own is not None:
                with suppress(OSError):
                    own.shutdown(socket.SHUT_RDWR)
                own.close()
        self._listener = None
        self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed by `cut`
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                self._ends += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_lead, args=(source, sink), daemon=True).start()


def _lead(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)

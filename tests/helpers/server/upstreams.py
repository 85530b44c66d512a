"""Small servers behind a proxy, which say what came to them."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import grpc

_CHUNK = 1 << 16


class Upstream:
    """A server of HTTP and gRPC on two sockets of a directory; it can be killed and started again.

    Args:
        name: its name, which is in all answers.
        place: directory.

    Attributes:
        ready: whether it says that it is ready.
        asked: number of requests, without those about health.
        came: bytes of the upload that is coming.
        release: event that the second part of a stream waits for.
    """

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self.ready = True
        self.asked = 0
        self.came = 0
        self.release = threading.Event()
        self._place = place
        self._connections: set[socket.socket] = set()
        self.start()

    def start(self) -> None:
        """Listen on NAME.sock and NAME-grpc.sock."""
        self._http = _Server(str(self._place / f"{self.name}.sock"), _Handler)
        self._http.upstream = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=[0.01], daemon=True)
        self._thread.start()
        self._grpc = grpc.server(ThreadPoolExecutor(2), handlers=[_Rpc(self.name)])
        self._grpc.add_insecure_port(f"unix:{self._place / f'{self.name}-grpc.sock'}")
        self._grpc.start()

    def kill(self) -> None:
        """Cut all connections, and take no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._grpc.stop(None).wait()
        for file in self._place.glob(f"{self.name}*.sock"):
            file.unlink()


class _Server(ThreadingUnixStreamServer):
    upstream: Upstream
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.own = self.server.upstream
        self.own._connections.add(self.connection)

    def finish(self) -> None:
        self.own._connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        if self.path == "/v2/health/ready":
            self._answer(200 if self.own.ready else 503)
            return
        self.own.asked += 1
        self._answer(200)

    def do_POST(self) -> None:
        self.own.asked += 1
        self._read()
        how = self.headers.get("X-Test")
        if how == "dies":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif how == "streams":
            self._stream()
        else:
            self._answer(503 if how == "busy" else 200)

    def _read(self) -> None:
        left, self.own.came = int(self.headers["Content-Length"]), 0
        while left > 0:
            part = self.rfile.read1(min(left, _CHUNK))
            if not part:
                return
            left -= len(part)
            self.own.came += len(part)

    def _answer(self, status: int) -> None:
        facts = {"server": self.own.name, "path": self.path, "came": self.own.came, "headers": dict(self.headers)}
        body = json.dumps(facts).encode()
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"d\r\ndata: first\n\n\r\n")
        self.own.release.wait(100)
        self.wfile.write(b"c\r\ndata: last\n\n\r\n0\r\n\r\n")


class _Rpc(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types here
    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Answer each method, unary or a stream of both sides, with the server's name."""
        if details.method.endswith("ModelStreamInfer"):
            return grpc.stream_stream_rpc_method_handler(lambda parts, _: (self._name + part for part in parts))
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self._name)

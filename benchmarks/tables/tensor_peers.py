"""Servers that only receive a large tensor: python -m benchmarks.tables.tensor_peers KIND PORT

They show what the bytes, ASGI and gRPC cost: each answers four bytes.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

__all__ = ["ANSWER", "METHOD"]

ANSWER = b"done"
METHOD = "/benchmark/Receive"


def by_socket(port: int) -> None:
    """Receive as many bytes as the first eight say into a buffer."""
    with socket.create_server(("127.0.0.1", port)) as server:
        buffer = bytearray()
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while head := connection.recv(8, socket.MSG_WAITALL):
                    size = int.from_bytes(head, "little")
                    if len(buffer) < size:
                        buffer = bytearray(size)
                    connection.recv_into(buffer, size, socket.MSG_WAITALL)
                    connection.sendall(ANSWER)


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Receive a body with as little as ASGI lets one do."""
    if scope["type"] != "http":
        return
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    b"".join(parts)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": ANSWER})


def by_asgi(port: int) -> None:
    """Serve the application with uvicorn."""
    import uvicorn

    uvicorn.run(application, host="127.0.0.1", port=port, log_level="error", loop="uvloop", http="httptools")


def by_grpc(port: int) -> None:
    """Receive messages with grpcio's asyncio server, without parsing them."""
    import grpc

    async def answer(message: bytes, _: Any) -> bytes:
        del message
        return ANSWER

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer) if details.method == METHOD else None

    async def serve() -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        server.add_generic_rpc_handlers([Handler()])
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


if __name__ == "__main__":
    {"socket": by_socket, "asgi": by_asgi, "grpc": by_grpc}[sys.argv[1]](int(sys.argv[2]))

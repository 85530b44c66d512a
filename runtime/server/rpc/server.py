"""gRPC server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from tpeft_deploy.errors import Conflict
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.v2.limits import RpcLimits

__all__ = ["RpcServer", "Tls"]

_AGE_MS = 3_600_000  # clients then reconnect for the next call, which lets load balancers rebalance
_PING_MS = 60_000  # a client that is silent for two intervals is disconnected, which ends its streams
_METADATA_BYTES = 16 << 10


@dataclass(frozen=True)
class Tls:
    """TLS credentials of a server.

    Attributes:
        certificate: certificate chain in PEM.
        key: private key in PEM.
    """

    certificate: bytes
    key: bytes


class RpcServer:
    """A gRPC server on one port; created, started and stopped on the event loop that serves it.

    Args:
        servicer: generic handler of all calls.
        limits: limits of messages and connections, the same as the servicer's.
        host: name or address to listen on; IPv6 without brackets.
        port: port to listen on; 0 picks a free port.
        tls: TLS credentials; None for plain text.

    Attributes:
        port: port that the server listens on.

    Raises:
        Conflict: the port is taken, or certificate and key are unusable.
    """

    def __init__(self, servicer: Servicer, limits: RpcLimits, *, host: str, port: int, tls: Tls | None = None) -> None:
        options = [
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # otherwise a second server on the port receives half of the calls
            ("grpc.max_allowed_incoming_connections", limits.connections),
            ("grpc.max_concurrent_streams", limits.calls),
            ("grpc.server_handshake_timeout_ms", max(1, round(1000 * limits.handshake_seconds))),
            ("grpc.max_connection_idle_ms", max(1, round(1000 * limits.idle_seconds))),
            ("grpc.max_connection_age_ms", _AGE_MS),
            ("grpc.keepalive_time_ms", _PING_MS),
            ("grpc.keepalive_timeout_ms", _PING_MS),
            ("grpc.max_metadata_size", _METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        ]
        self._server = grpc.aio.server(handlers=(servicer,), options=options)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port: int = self._server.add_insecure_port(address)
            else:
                self._tls = tls
                credentials = grpc.dynamic_ssl_server_credentials(_shown(tls), self._shown_now)
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError:  # its text has no details
            raise Conflict(
                f"gRPC on {address}",
                problem="cannot listen there",
                fix="Take another port, or look at the certificate and its key.",
            ) from None

    def renew(self, tls: Tls) -> None:
        """Use other TLS credentials for new connections."""
        self._tls = tls

    def _shown_now(self) -> Any:
        return _shown(self._tls)

    async def start(self) -> None:
        """Start accepting calls."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Stop accepting calls, and cancel in-flight calls after `grace` seconds."""
        await self._server.stop(grace)


def _shown(tls: Tls) -> Any:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)])

"""TLS certificate of a server, reloaded when its files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from tpeft_deploy.errors import ServerError

__all__ = ["Certificates"]

_log = logging.getLogger("tpeft_deploy.server")


class Certificates:
    """Certificate chain and private key, reloadable for new connections.

    Args:
        certificate: file with the chain, PEM.
        key: file with the private key, PEM, not encrypted.

    Attributes:
        context: TLS context of HTTP connections.
        pem: certificate and key, for gRPC.

    Raises:
        ServerError: a file cannot be read, or the key does not match the certificate.
    """

    context: ssl.SSLContext
    pem: tuple[bytes, bytes]

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._seen = self._state()
        self._load()

    def renew(self) -> bool:
        """Reload the files if they have changed; unusable files are logged, and the current certificate stays.

        Returns:
            Whether the certificate has changed.
        """
        state = self._state()
        if state == self._seen:
            return False
        try:
            self._load()
        except ServerError as error:
            _log.error("%s; the present certificate stays", error)
            self._seen = state
            return False
        self._seen = state  # state before reading: changes while reading cause another reload
        _log.info("new connections get the certificate that is now in %s", self._files[0])
        return True

    def _state(self) -> object:
        return [_state_of(file) for file in self._files]

    def _load(self) -> None:
        doing = f"use certificate {self._files[0]} and key {self._files[1]}"

        def password() -> str:  # otherwise OpenSSL would prompt on the terminal
            raise ServerError(doing, expected="a key that is not encrypted", got="an encrypted one")

        try:
            certificate, key = (file.read_bytes() for file in self._files)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._files, password)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            raise ServerError(doing, problem=f"they are not each other's, or no PEM: {reason}") from None
        except OSError as error:
            raise ServerError(f"read {error.filename}", problem=error.strerror or str(error)) from None
        self.context, self.pem = context, (certificate, key)


def _state_of(file: Path) -> object:
    """Return a value that changes with a file, or with the target of a link."""
    try:
        found = file.stat()
    except OSError as error:
        return error.errno
    return found.st_mtime_ns, found.st_size, found.st_ino

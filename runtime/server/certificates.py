"""The certificate that a server shows, read again when its files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from tpeft_deploy.errors import ServerError

__all__ = ["Certificates"]

_log = logging.getLogger("tpeft_deploy.server")


class Certificates:
    """A certificate chain and its key, which new connections get as they are in their files now.

    Args:
        certificate: file with the chain, PEM.
        key: file with the private key, PEM, not encrypted.

    Attributes:
        context: for connections over HTTP.
        pem: certificate and key, for gRPC.

    Raises:
        ServerError: one of them cannot be read, or they are not each other's.
    """

    context: ssl.SSLContext
    pem: tuple[bytes, bytes]

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._seen = self._state()
        self._load()

    def renew(self) -> bool:
        """Read the files again if they have changed; what cannot be used is logged, and the present ones stay.

        Returns:
            Whether there is another certificate.
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
        self._seen = state  # as it was before: what changed while it was read is read again
        _log.info("new connections get the certificate that is now in %s", self._files[0])
        return True

    def _state(self) -> object:
        return [_state_of(file) for file in self._files]

    def _load(self) -> None:
        doing = f"use certificate {self._files[0]} and key {self._files[1]}"

        def password() -> str:  # else OpenSSL would ask for it on the terminal
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
    """What changes with a file, or with what a link stands for."""
    try:
        found = file.stat()
    except OSError as error:
        return error.errno
    return found.st_mtime_ns, found.st_size, found.st_ino

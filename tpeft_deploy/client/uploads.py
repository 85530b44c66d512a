"""Uploads of adapters: streamed from disk; pickles are refused."""

from __future__ import annotations

import secrets
import struct
from pathlib import Path

from tpeft_deploy.client.body import FilePiece, RequestBody
from tpeft_deploy.client.exchange import Payload
from tpeft_deploy.client.tensors import Bytes
from tpeft_deploy.errors import FormatError

__all__ = ["AdapterUpload"]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_CONVERTED = "adapter.safetensors"  # written by `tpeft-deploy convert`
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_FIX = "Turn it into safetensors first: 'tpeft-deploy convert ADAPTER OUT --to tpeft'."


class AdapterUpload:
    """The files of an adapter as multipart/form-data.

    Args:
        path: a .safetensors file, or a directory that PEFT saved.

    Raises:
        FormatError: the path is neither, or a pickle.
    """

    def __init__(self, path: Path) -> None:
        self._parts = [(part, _piece(file)) for part, file in _files(path)]
        self._boundary = secrets.token_hex(16)

    def payload(self, left: float | None) -> Payload:
        """Return the multipart body, without paths of this machine."""
        pieces: list[Bytes | FilePiece] = []
        for part, piece in self._parts:
            kind = "application/json" if part == "config" else "application/octet-stream"
            name = _CONFIG if part == "config" else _CONVERTED
            head = f'--{self._boundary}\r\nContent-Disposition: form-data; name="{part}"; filename="{name}"\r\n'
            pieces += [f"{head}Content-Type: {kind}\r\n\r\n".encode(), piece, b"\r\n"]
        pieces.append(f"--{self._boundary}--\r\n".encode())
        return Payload({"Content-Type": f"multipart/form-data; boundary={self._boundary}"}, RequestBody(pieces))


def _files(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        _check(path)
        # Without PEFT's configuration beside its weights, their scale would be lost.
        config = path.parent / _CONFIG
        beside = path.name == _WEIGHTS and config.is_file()
        return [("config", config), ("weights", path)] if beside else [("weights", path)]
    if (path / _CONVERTED).is_file():
        return _files(path / _CONVERTED)
    if (path / _CONFIG).is_file() and (path / _WEIGHTS).is_file():
        return _files(path / _WEIGHTS)
    pickle = next((file for file in sorted(path.glob("*")) if file.suffix in _PICKLES), None)
    got = "no such path" if not path.exists() else "a directory without them"
    if pickle is not None:
        raise _pickled(pickle)
    raise FormatError(
        f"send {path}", expected=f"a .safetensors file, or a directory with {_CONFIG} and {_WEIGHTS}", got=got
    )


def _check(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise _pickled(path)
    with path.open("rb") as file:
        start = file.read(9)
    size = path.stat().st_size
    # safetensors begins with the length of its header, which is a JSON object.
    if len(start) < 9 or struct.unpack("<Q", start[:8])[0] > size - 8 or start[8:] != b"{":
        raise FormatError(f"send {path}", expected="safetensors", got=f"another kind of file, {size} bytes", fix=_FIX)


def _pickled(path: Path) -> FormatError:
    return FormatError(
        f"send {path}",
        expected="safetensors",
        got=f"{path.name}, a pickle, which can run code when it is read",
        fix=_FIX,
    )


def _piece(path: Path) -> FilePiece:
    return FilePiece(path, path.stat().st_size)

"""Parameters of the repository's load and unload calls, with files as base64 or raw bytes."""

from __future__ import annotations

import binascii
from collections.abc import AsyncIterator, Mapping

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.v2.messages import Encoded, LoadParameter, Parameter, UploadPart
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["check_unload_parameters", "files_of", "parts_of"]

_BASE64 = 1 << 18  # characters decoded at once; a multiple of four


def files_of(name: str, parameters: Mapping[str, LoadParameter]) -> dict[str, LoadParameter]:
    """Return the files among the parameters of a load call.

    Raises:
        Unsupported: the parameter `config` is given.
        ProtocolError: a parameter is unknown.
    """
    files = {key: value for key, value in parameters.items() if key.startswith("file:")}
    unknown = sorted(set(parameters) - set(files) - {"pin"})
    if "config" in unknown:
        raise Unsupported(
            f"load model {name!r}", problem="a model's configuration follows from its bundle", fix="Send no config."
        )
    if unknown:
        raise ProtocolError(
            f"load model {name!r}",
            expected="parameters 'file:...' and 'pin'",
            got=", ".join(map(quoted, unknown)),
        )
    return files


def check_unload_parameters(name: str, parameters: Mapping[str, LoadParameter]) -> None:
    """Raise ProtocolError for an unknown parameter of an unload call."""
    unknown = sorted(set(parameters) - {"unload_dependents"})
    if unknown:
        got = ", ".join(map(quoted, unknown))
        raise ProtocolError(f"unload model {name!r}", expected="no parameters but 'unload_dependents'", got=got)


async def parts_of(name: str, files: Mapping[str, LoadParameter], limit: int) -> AsyncIterator[UploadPart]:
    """Yield the files of a load call as upload parts; only the suffix of a file name is used."""
    for key, value in files.items():
        part = "config" if key.endswith("adapter_config.json") else "weights"
        if not key.endswith((".safetensors", "adapter_config.json")):
            raise ProtocolError(
                f"load model {name!r}", expected="files *.safetensors and adapter_config.json", got=repr(key[:100])
            )
        doing = f"load model {name!r}, {key[:100]!r}"
        yield part, _bytes(value) if isinstance(value, bytes) else _decoded(doing, value, limit)


async def _bytes(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _decoded(doing: str, value: Parameter | Encoded, limit: int) -> AsyncIterator[bytes]:
    """Decode base64 in pieces, so that no second copy of a file is held."""
    if not isinstance(value, str | Encoded):
        raise ProtocolError(doing, expected="base64", got=type(value).__name__)
    try:
        text = value.text if isinstance(value, Encoded) else memoryview(value.encode("ascii"))
        if len(text) > 4 * limit // 3 + 4:
            raise TooLarge(doing, expected=f"at most {limit:,} bytes", got="more")
        for at in range(0, len(text), _BASE64):
            data = binascii.a2b_base64(text[at : at + _BASE64], strict_mode=True)
            if len(data) < _BASE64 // 4 * 3 and at + _BASE64 < len(text):
                raise ProtocolError(doing, expected="base64", got="padding before its end")
            yield data
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(doing, expected="base64", got=str(error)) from None

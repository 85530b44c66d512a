"""Server-sent events of generated text, without reading anything from a connection."""

from __future__ import annotations

import json
from typing import Any

from tpeft_deploy.client.answers import Document, error_in_stream
from tpeft_deploy.errors import ServerError, TpeftError, Unavailable

__all__ = ["TextEvents"]

_FIELD = b"data:"
_LAST = b"[DONE]"


class TextEvents:
    """Reads events in the form of OpenAI's API.

    Args:
        doing: purpose of the call, for error messages.

    Attributes:
        reason: reason of the text's end; None before it.
        usage: numbers of tokens; None before the end.
    """

    def __init__(self, doing: str) -> None:
        self.reason: str | None = None
        self.usage: Document | None = None
        self._doing = doing
        self._rest = b""
        self._failure: TpeftError | None = None
        self._ended = False

    def read(self, chunk: bytes) -> list[str]:
        """Return the pieces of text in the lines that a chunk completes.

        Raises:
            ServerError: a line is no event of generated text.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        found = [line.removeprefix(_FIELD).strip() for line in lines if line.startswith(_FIELD)]
        return [text for data in found if (text := self._text(data))]

    def check_end(self) -> None:
        """Check that the text is whole.

        Raises:
            TpeftError: the server's error, which ended the stream.
            Unavailable: the last event is missing.
        """
        if self._failure is not None:
            raise self._failure
        if not self._ended:
            raise Unavailable(self._doing, problem="the connection was lost before the text's end")

    def _text(self, data: bytes) -> str:
        if data == _LAST:
            self._ended = True
            return ""
        try:
            event: Any = json.loads(data)
            self._failure = self._failure or error_in_stream(event)
            if self._failure is None:
                self.usage = event.get("usage") or self.usage
                return "".join(map(self._choice, event["choices"]))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ServerError(self._doing, expected="an event of generated text", got=repr(data)[:120]) from error
        return ""

    def _choice(self, choice: Document) -> str:
        self.reason = choice["finish_reason"] or self.reason
        text: str = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
        return text

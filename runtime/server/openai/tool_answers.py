"""Tool calls of one sequence as documents of OpenAI's API."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable

from tpeft_deploy.runtime.server.openai.tools import CallReaders
from tpeft_deploy.runtime.server.v2.messages import Document
from tpeft_deploy.runtime.text.tool_calls import AnswerPart

__all__ = ["CallDocuments"]

_LETTERS = string.ascii_letters + string.digits


class CallDocuments:
    """Reads one sequence, and makes documents of its content and its calls.

    Args:
        readers: how calls are read.
    """

    def __init__(self, readers: CallReaders) -> None:
        self._reader = readers.make()
        self._short = readers.short_ids
        self._made = 0

    def push(self, text: str) -> list[Document]:
        """Add text; returns the deltas of a stream that are settled with it."""
        return self._deltas(self._reader.push(text))

    def flush(self) -> list[Document]:
        """Return the rest of the deltas, as the text is over."""
        return self._deltas(self._reader.flush())

    def reason(self, reason: str) -> str:
        """Return why the answer ends, given why the sequence did."""
        return "tool_calls" if reason == "stop" and self._made else reason

    def message(self, text: str) -> Document:
        """Return the fields of a message with the whole text."""
        content, calls = "", list[Document]()
        for delta in [*self.push(text), *self.flush()]:
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def _deltas(self, pieces: Iterable[AnswerPart]) -> list[Document]:
        found: list[Document] = []
        for piece in pieces:
            if isinstance(piece, str):
                found.append({"content": piece})
                continue
            if piece.begins:
                function = {"name": piece.name, "arguments": ""}
                call = {"index": self._made, "id": self._id(), "type": "function", "function": function}
                found.append({"tool_calls": [call]})
                self._made += 1
            found.append({"tool_calls": [{"index": self._made - 1, "function": {"arguments": piece.arguments}}]})
        return found

    def _id(self) -> str:
        letters = "".join(secrets.choice(_LETTERS) for _ in range(9 if self._short else 24))
        return letters if self._short else f"call_{letters}"

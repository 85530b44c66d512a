"""Triton's generate extension: the body of a request over HTTP or gRPC, and the documents of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import orjson

from tpeft_deploy.errors import InputError, ProtocolError
from tpeft_deploy.runtime.generation.handle import Generated
from tpeft_deploy.runtime.server.openai.answers import AnswerDocuments
from tpeft_deploy.runtime.server.openai.bodies import CompletionBody
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.server.v2.messages import Document

__all__ = ["TEXT_INPUT", "TEXT_OUTPUT", "GenerateBody", "GenerateDocuments", "GenerateRequest", "generate_body"]

TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
"""Names of the input and the output."""

_LINE = 200


class GenerateRequest(Body, forbid_unknown_fields=False):
    """Body of `POST /v2/models/MODEL/generate`; parameters may also be fields beside `text_input`."""

    text_input: str
    parameters: dict[str, Any] | None = None


class GenerateBody(CompletionBody, kw_only=True):
    """A completion with the parameters of Triton's backends beside those of OpenAI's API.

    Attributes:
        version: version of the model; empty for the current one.
        adapter: task, where the model is the base.
        lora_name: the same, as Triton's vLLM backend names it.
        stop_words: further stop strings, as Triton's TensorRT-LLM backend names them.
        exclude_input_in_output: whether answers are without the prompt, as they always are.
    """

    version: str = ""
    adapter: str | None = None
    lora_name: str | None = None
    stop_words: str | list[str] | None = None
    exclude_input_in_output: bool = True
    bad_words: Any = None

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {**CompletionBody.harmless, "bad_words": ("", [""])}
    unlisted: ClassVar[tuple[str, ...]] = (*CompletionBody.unlisted, "bad_words")

    @property
    def address(self) -> tuple[str, str, str | None]:
        """Model, version and adapter."""
        return self.model, self.version, self.adapter or self.lora_name

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        words = [self.stop_words] if isinstance(self.stop_words, str) else self.stop_words or []
        return [*super().stops, *filter(None, words)]

    def check(self) -> None:
        """Refuse fields that the server does not support; raises as `CompletionBody.check` does."""
        super().check()
        if self.n not in {None, 1}:
            raise InputError("read field 'n'", expected="1, as an answer has one text", got=self.n)
        if self.logprobs is not None:
            raise InputError(
                "read field 'logprobs'", problem="an answer has only text", fix="POST /v1/completions has them."
            )
        if self.echo or not self.exclude_input_in_output:
            name = "echo" if self.echo else "exclude_input_in_output"
            raise InputError(f"read field '{name}'", problem="answers are without the prompt", fix="Leave it out.")


def generate_body(fields: Mapping[str, Any], **given: Any) -> GenerateBody:
    """Return the body of a request.

    Args:
        fields: parameters by name; those that are unknown are ignored, and texts that are numbers are read as such.
        given: fields of `GenerateBody` that are not the request's parameters.

    Raises:
        ProtocolError: a parameter has another type.
    """
    found = dict(fields)
    packed = found.pop("sampling_parameters", None)
    try:
        found |= _object(packed) if packed else {}
        return msgspec.convert({**found, **given}, GenerateBody, strict=False)
    except (msgspec.ValidationError, orjson.JSONDecodeError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:_LINE]
        raise ProtocolError("read parameters", expected="those of a completion", problem=problem) from None


class GenerateDocuments(AnswerDocuments):
    """Documents of the generate extension."""

    done = b""

    def whole(self, results: Sequence[Generated], usage: Document) -> Document:
        """Return the document of a request that is not streamed."""
        return self._delta(0, results[0].text, None, results[0].reason)

    def chunk(self, choices: Sequence[Document], usage: Document | None, *, with_usage: bool) -> Document:
        """Return the document of one event."""
        return choices[0]

    def _head_of(self, id: str, model: str, version: str) -> Document:
        return {"model_name": model, "model_version": version}

    def _choice(self, index: int, text: str, logprobs: Document | None, reason: str | None) -> Document:
        found = {**self._head, TEXT_OUTPUT: text}
        return found if reason is None else {**found, "finish_reason": reason}

    def _delta(self, index: int, text: str, logprobs: Document | None, reason: str | None) -> Document:
        return self._choice(index, text, logprobs, reason)

    def _document_of(self, tokens: Sequence[Any]) -> Document:
        raise NotImplementedError  # log-probabilities are refused


def _object(packed: Any) -> dict[str, Any]:
    found = orjson.loads(packed) if isinstance(packed, str) else packed
    if not isinstance(found, dict):
        raise ValueError("sampling_parameters is no JSON object")  # noqa: TRY004  # told as the others are
    return found

"""Bodies of requests in OpenAI's API.

Fields that are not named here change no answer and are ignored, as clients send many; those that would change it are
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.server.openai.tools import CallReaders
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.text.images import ImageFile
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = [
    "CompletionBody",
    "Count",
    "GenerationBody",
    "TokenId",
    "refuse_unsupported",
    "texts_or_tokens",
]

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

_MOST_STOPS = 16
_BIAS = 100
_MOST_BIASES = 1024  # each sequence copies and checks them
_MOST_SEQUENCES = 128


class GenerationBody(Body, forbid_unknown_fields=False, kw_only=True):
    """Fields that chat completions and completions share; null is the default of each."""

    model: str
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Count | None = None
    parse_special: bool = False
    logits_processors: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    response_format: dict[str, Any] | None = None
    stop_token_ids: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"min_tokens": (0,)}
    """Values of refused fields that ask for nothing."""
    unlisted: ClassVar[tuple[str, ...]] = (
        *("guided_choice", "guided_grammar", "guided_json", "guided_regex", "ignore_eos", "logits_processors"),
        *("min_tokens", "stop_token_ids", "structured_outputs", "use_beam_search"),
    )

    def check(self) -> None:
        """Refuse fields that the server does not support.

        Raises:
            InputError: a field asks for something else than the server does.
        """
        refuse_unsupported(self, self.harmless)
        if self.stream_options and not self.stream:
            raise InputError("read field 'stream_options'", expected="stream to be true with it", got="stream not set")
        if len(self.stops) > _MOST_STOPS:
            raise InputError("read field 'stop'", expected=f"at most {_MOST_STOPS} texts", got=len(self.stops))

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of the answer; None for text.

        Raises:
            InputError: the format is none of those that the server knows.
        """
        given = self.response_format or {"type": "text"}
        kind, inner = given.get("type"), given.get("json_schema")
        if kind == "text":
            return None
        schema = {"type": "object"} if kind == "json_object" else inner.get("schema") if isinstance(inner, dict) else 0
        if kind not in {"json_object", "json_schema"} or not isinstance(schema, dict):
            raise InputError(
                "read field 'response_format'",
                expected="type 'text', 'json_object', or 'json_schema' with an object json_schema.schema",
                got=repr(kind)[:40],
            )
        return schema

    @property
    def constrained(self) -> bool:
        """Whether a grammar bounds the answer."""
        return self.schema is not None

    def calls(self, text: ModelText) -> CallReaders | None:
        """Return how tool calls of the answer are read; None where the answer is text.

        Args:
            text: text of the bundle.
        """
        return None

    @property
    def address(self) -> tuple[str, str, str | None]:
        """Model, version and adapter, as `Generations.target` takes them."""
        return self.model, "", None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def images(self) -> list[ImageFile]:
        """The files of the images of the prompt."""
        return []

    @property
    def attached(self) -> int:
        """Bytes of the body that are images."""
        return 0

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def top(self) -> int | None:
        """Number of most probable tokens to give with each token; None for no log-probabilities."""
        raise NotImplementedError

    def echoed(self, text_of: Callable[[list[int]], str]) -> list[str]:
        """Return the text before each answer; empty where answers begin without.

        Args:
            text_of: returns the text of tokens.
        """
        return []

    def changes(self) -> dict[str, Any]:
        """Return the values of `Sampling` that the request sets, by name."""
        names = ("n", "seed", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        found = {name: getattr(self, name) for name in (*names, "repetition_penalty")}
        top_k = 0 if self.top_k == -1 else self.top_k  # both are no bound
        return {
            **found,
            "top_k": top_k,
            "stop_strings": self.stops or None,
            "logprobs": self.top,
            "logit_bias": self._biases(),
        }

    def _biases(self) -> dict[int, float] | None:
        doing, found = "read field 'logit_bias'", {}
        given = self.logit_bias or {}
        if len(given) > _MOST_BIASES:
            raise InputError(doing, expected=f"at most {_MOST_BIASES} tokens", got=len(given))
        for token, bias in given.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise InputError(doing, expected="tokens as names of its fields", got=repr(token[:40]))
            if not -_BIAS <= bias <= _BIAS:
                raise InputError(doing, expected=f"numbers from -{_BIAS} to {_BIAS}", got=bias)
            found[int(token)] = bias
        return found or None


class CompletionBody(GenerationBody, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[TokenId | str | list[TokenId]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool = True
    echo: bool | None = None
    best_of: Any = None
    prompt_embeds: Any = None
    prompt_logprobs: Any = None
    suffix: Any = None
    truncate_prompt_tokens: Any = None

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {**GenerationBody.harmless, "best_of": (1,), "suffix": ("",)}
    unlisted: ClassVar[tuple[str, ...]] = (
        *GenerationBody.unlisted,
        *("best_of", "prompt_embeds", "prompt_logprobs", "suffix", "truncate_prompt_tokens"),
    )

    @property
    def top(self) -> int | None:
        """Number of most probable tokens to give with each token; None for no log-probabilities."""
        return self.logprobs

    def check(self) -> None:
        """Refuse fields that the server does not support; raises as `GenerationBody.check` does."""
        super().check()
        if self.echo and self.logprobs is not None:
            expected = "no logprobs with it, as prompts have none"
            raise InputError("read field 'echo'", expected=expected, got=f"logprobs {self.logprobs}")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens.

        Raises:
            InputError: there are none, or too many, or they are of different types.
        """
        several = texts_or_tokens("prompt", self.prompt)
        if len(several) * (self.n or 1) > _MOST_SEQUENCES:
            got = f"{len(several)} prompts and n of {self.n or 1}"
            raise InputError("read field 'prompt'", expected=f"at most {_MOST_SEQUENCES} sequences", got=got)
        return several

    def echoed(self, text_of: Callable[[list[int]], str]) -> list[str]:
        """Return the prompts as texts, each as often as it has answers, if the answers repeat them."""
        if not self.echo:
            return []
        texts = [own if isinstance(own, str) else text_of(own) for own in self.prompts]
        return [own for own in texts for _ in range(self.n or 1)]


def refuse_unsupported(body: Body, harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse the unlisted fields of a body.

    Args:
        body: body of a request.
        harmless: field -> values that ask for nothing.

    Raises:
        InputError: a field asks for something.
    """
    for name in body.unlisted:
        if getattr(body, name) not in (None, False, [], {}, *harmless.get(name, ())):
            raise InputError(
                f"read field '{name}'", problem="the server does not support it", fix="Leave the field out."
            )


def texts_or_tokens(name: str, given: Any) -> list[str | list[int]]:
    """Return the texts, or the lists of tokens, of a field that is one or several of either.

    Raises:
        InputError: there are none, or they are of different types.
    """
    several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    texts = all(isinstance(own, str) for own in several)
    tokens = all(isinstance(own, list) and all(isinstance(each, int) for each in own) for own in several)
    if not several or not (texts or tokens):
        raise InputError(f"read field '{name}'", expected="a text, texts, tokens or lists of tokens", got="others")
    return list(several)

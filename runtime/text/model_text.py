"""Text of a model: what a bundle keeps in its folder `text/`, loaded with `tokenizers` and `jinja2` alone."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.text_files import TOKENIZER, TextFacts
from tpeft_deploy.errors import InputError, IntegrityError, brief, requires
from tpeft_deploy.runtime.generation.handle import Detokeniser
from tpeft_deploy.runtime.generation.sampling import Constraint, Sampling
from tpeft_deploy.runtime.text.detokeniser import MakeDetokeniser, clean, detokenisers, token_bytes
from tpeft_deploy.runtime.text.json_constraint import grammar_tokenizer, json_constraint
from tpeft_deploy.runtime.text.tool_format import ToolFormat, tool_format

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    from tpeft_deploy.runtime.text.chat_template import ChatTemplate

__all__ = ["Encoding", "ModelText", "schema_of", "shown_by", "tokens_before"]

_EXTRA = "text"


class Encoding(NamedTuple):
    """Tokens of a text or a pair, and their types, as the model takes them."""

    ids: list[int]
    type_ids: list[int]


@dataclass(frozen=True)
class _Detokenisers:
    """Factory of detokenisers."""

    before: tuple[int, ...]
    shown: tuple[str, ...]
    make: MakeDetokeniser

    def __call__(self) -> Detokeniser:
        return self.make(self.before, self.shown)


@dataclass(frozen=True)
class _Constraints:
    """Factory of constraints."""

    schema: Mapping[str, Any]
    make: Callable[[], Constraint]

    def __call__(self) -> Constraint:
        return self.make()


def tokens_before(factory: Callable[[], Detokeniser]) -> tuple[int, ...] | None:
    """Return the tokens that `ModelText.detokeniser` was given; None for another factory."""
    return factory.before if isinstance(factory, _Detokenisers) else None


def shown_by(factory: Callable[[], Detokeniser] | None) -> tuple[str, ...]:
    """Return the special tokens that `ModelText.detokeniser` was given; none for another factory."""
    return factory.shown if isinstance(factory, _Detokenisers) else ()


def schema_of(factory: Callable[[], Constraint]) -> Mapping[str, Any] | None:
    """Return the schema that `ModelText.constraint` was given; None for another factory."""
    return factory.schema if isinstance(factory, _Constraints) else None


class ModelText:
    """Tokenizer, chat templates and generation defaults of a bundle; safe to use from several threads.

    Args:
        tokenizer: text of tokenizer.json.
        facts: further facts that the bundle records.
        source: name of the bundle, for messages.

    Attributes:
        facts: further facts.
        token_bytes: function that returns the bytes of one token's text; those of a special token are its name.

    Raises:
        MissingExtra: tokenizers is not installed.
        IntegrityError: the text is not a tokenizer's.
    """

    def __init__(self, tokenizer: str, facts: TextFacts, *, source: str = "the model") -> None:
        with requires("tokenizers", _EXTRA, f"read the text of {source}"):
            from tokenizers import Tokenizer
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer)
            self._literal: Tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # tokenizers raises nothing more exact
            raise IntegrityError(f"read the tokenizer of {source}", problem=brief(error, 200)) from error
        for own in (self._tokenizer, self._literal):
            own.no_truncation()
            own.no_padding()
        self._literal.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, own in added.items() if own.special and own.content)
        self._source = source
        self._given = tokenizer
        self.facts = facts
        self._detokenisers = detokenisers(self._tokenizer, clean_up=facts.clean_up)
        self.token_bytes = token_bytes(self._tokenizer)
        self._templates: dict[str, ChatTemplate] = {}

    @classmethod
    def open(cls, bundle: Bundle) -> ModelText:
        """Read the text of a bundle; the digests of its files are checked.

        Raises:
            InputError: the bundle has no text.
            MissingExtra: tokenizers is not installed.
            IntegrityError: a file is damaged.
        """
        source = f"bundle {bundle.path}"
        if not bundle.manifest.text:
            raise InputError(
                f"read the text of {source}",
                problem="it has no tokenizer",
                fix="Export a directory that has one, or use tokens.",
            )
        tokenizer = bundle.check_file(f"text/{TOKENIZER}").read_text(encoding="utf-8")
        return cls(tokenizer, TextFacts.read(bundle), source=source)

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.facts.templates)

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens of the tokenizer, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True, literal: bool = False) -> list[int]:
        """Tokens of a text.

        Args:
            text: any text.
            special: whether to add the tokens that the model expects around a text, such as the first.
            literal: whether names of special tokens in the text are text; by default they stand for these tokens.

        Raises:
            InputError: it is no text.
        """
        return self.encoding(text, special=special, literal=literal).ids

    def encoding(
        self,
        text: str,
        pair: str | None = None,
        *,
        special: bool = True,
        literal: bool = False,
        most: int | None = None,
    ) -> Encoding:
        """Tokens of a text, or of a pair of texts, with their types.

        Args:
            text: any text.
            pair: second text.
            special: as for `encode`.
            literal: as for `encode`.
            most: number of tokens behind which a text that is no pair is cut, special tokens not.

        Raises:
            InputError: it is no text.
        """
        try:
            parts = [self._encoded(own, literal) for own in ((text,) if pair is None else (text, pair))]
            if most is not None and pair is None:
                parts[0].truncate(max(0, most - special * self._tokenizer.num_special_tokens_to_add(is_pair=False)))
            second = parts[1] if pair is not None else None
            found = self._tokenizer.post_process(parts[0], second, add_special_tokens=special)
        except (TypeError, ValueError) as error:  # a lone surrogate is no text either
            raise InputError("encode a prompt", expected="text", got=brief(error, 100)) from error
        return Encoding(found.ids, found.type_ids if self.facts.token_types else [0] * len(found.ids))

    def _encoded(self, text: str, literal: bool) -> Any:
        """Encode a text without special tokens around it."""
        if not literal:
            return self._tokenizer.encode(text, add_special_tokens=False)
        found = self._literal.encode(text, add_special_tokens=False)
        names = self._special_names
        if names is not None and not self._special.isdisjoint(found.ids):
            # Some models have the names in their vocabularies too.  No tokenizer sees one that is cut.
            cut = names.sub(lambda name: f"{name[0][:1]}\ufdd0{name[0][1:]}", text.replace("\ufdd0", "\ufffd"))
            parts = [self._literal.encode(part, add_special_tokens=False) for part in cut.split("\ufdd0")]
            found = type(found).merge(parts, growing_offsets=True)
        return found

    def name(self, token: int) -> str | None:
        """Name of a token in the vocabulary; None where there is no such token."""
        return self._tokenizer.id_to_token(token)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special tokens only if asked for."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=not special)
        return clean(text) if self.facts.clean_up else text

    def detokeniser(self, before: Sequence[int] = (), *, shown: Sequence[str] = ()) -> Callable[[], Detokeniser]:
        """Make a factory of detokenisers, as `GenerationRequest.text` takes it.

        Args:
            before: tokens that the text continues; none for a text that begins anew, such as an answer.
            shown: names of special tokens that the text has, as it leaves out the others.
        """
        return _Detokenisers(tuple(before), tuple(shown), self._detokenisers)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls; None where the chat template does not show it."""
        templates = self.facts.templates
        return tool_format(templates.get("tool_use") or templates.get("default") or "")

    def render(self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None, **options: Any) -> str:
        """Text of a conversation by a chat template.

        Args:
            messages: messages with `role` and `content`.
            template: name of a template; by default "tool_use" where there are tools and that template, or "default".
            options: `add_generation_prompt` (True by default), `continue_final_message`, and any further variables of
                the template, such as `tools`.

        Raises:
            InputError: there is no such template, or it refuses the messages.
            MissingExtra: jinja2 is not installed.
        """
        flags = {key: options.pop(key) for key in ("add_generation_prompt", "continue_final_message") if key in options}
        variables = {**self.facts.special_tokens, **options}
        name = template or ("tool_use" if options.get("tools") and "tool_use" in self.facts.templates else "default")
        return self._template(name).render(messages, variables=variables, **flags)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, literal: bool = False, **options: Any) -> list[int]:
        """Tokens of a conversation; takes and raises what `render` does.

        Args:
            messages: messages with `role` and `content`.
            literal: whether names of special tokens in messages and options are text; those of the template never are.
            options: as for `render`.
        """
        try:
            return self._conversation(messages, literal, options)
        except RecursionError as error:
            raise InputError("encode a conversation", expected="values nested less deeply", got="deep ones") from error

    def _conversation(self, messages: Sequence[Mapping[str, Any]], literal: bool, options: dict[str, Any]) -> list[int]:
        names = self._special_names
        if not literal or names is None or not any(map(names.search, _strings([messages, options]))):
            return self.encode(self.render(messages, **options), special=False)
        mark = f"\ufdd0{secrets.token_hex(8)}"  # which no caller can write into a message
        opened, closed = f"{mark}<", f"{mark}>"
        marked = partial(names.sub, lambda found: f"{opened}{found[0]}{closed}")
        rendered = self.render(_mapped(messages, marked), **_mapped(options, marked))
        tokens: list[int] = []
        for index, part in enumerate(rendered.split(mark)):
            text = part[1:] if index else part
            if text:
                tokens += self.encode(text, special=False, literal=index > 0 and part[0] == "<")
        return tokens

    def sampling(self, **changes: Any) -> Sampling:
        """How tokens are sampled: the model's defaults, its stop tokens, and changes to these.

        Args:
            changes: values of `Sampling` by name; None leaves the default.

        Raises:
            InputError: a value is out of range.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        return Sampling(**{"stop_tokens": self.facts.stop_tokens, **self.facts.sampling, **given})

    def constraint(self, schema: Mapping[str, Any]) -> Callable[[], Constraint]:
        """Return a function that makes the constraint of one sequence to JSON of a schema.

        Args:
            schema: JSON schema.

        Raises:
            MissingExtra: llguidance is not installed.
            InputError: the schema is invalid or not supported, or the model has no stop token.
        """
        return _Constraints(schema, json_constraint(self._grammars, schema))

    @cached_property
    def _grammars(self) -> LLTokenizer:
        return grammar_tokenizer(self._given, self.facts.stop_tokens)

    @cached_property
    def _special_names(self) -> re.Pattern[str] | None:
        """Pattern of the names of special tokens, the longest of several; in any case, as a tokenizer may change it."""
        added = self._tokenizer.get_added_tokens_decoder()
        names = sorted((re.escape(added[token].content) for token in self._special), key=len)
        return re.compile("|".join(reversed(names)), re.IGNORECASE) if names else None

    def _template(self, name: str) -> ChatTemplate:
        if name not in self._templates:
            source = self.facts.templates.get(name)
            if source is None:
                known = ", ".join(sorted(self.facts.templates)) or "(there are none)"
                raise InputError(
                    "render a conversation",
                    expected=f"one of the chat templates {known}",
                    got=repr(name),
                    fix="Give a prompt in place of a chat, or export a tokenizer with a chat template.",
                )
            with requires("jinja2", _EXTRA, "render a conversation"):
                from tpeft_deploy.runtime.text.chat_template import ChatTemplate
            self._templates[name] = ChatTemplate(source)
        return self._templates[name]


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings of a value of JSON types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, own in value.items():
            yield from _strings(name)
            yield from _strings(own)
    elif isinstance(value, Sequence):
        for own in value:
            yield from _strings(own)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Copy of a value of JSON types with all strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(own, change) for name, own in value.items()}
    return [_mapped(own, change) for own in value] if isinstance(value, Sequence) else value

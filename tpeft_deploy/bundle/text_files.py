"""Folder `text/` of a bundle: the tokenizer, and what else turns text into tokens and back.

    text/tokenizer.json   the tokenizer, as the package tokenizers reads it
    text/text.json        chat templates, special tokens, generation defaults, pooling and labels (`TextFacts`)
    text/image.json       preparation of images (`ImageFacts`), of a model that reads them

The manifest's field `text` has their digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from tpeft_deploy.bundle.image_facts import IMAGE, ImageFacts
from tpeft_deploy.bundle.manifest import FileRecord
from tpeft_deploy.errors import IntegrityError
from tpeft_deploy.files import digest_file
from tpeft_deploy.labels import HeadLabels

if TYPE_CHECKING:
    from tpeft_deploy.bundle.directory import Bundle

__all__ = ["FACTS", "STATES", "TOKENIZER", "Mode", "Pooling", "TextFacts", "write_text"]

TOKENIZER, FACTS = "tokenizer.json", "text.json"
STATES = "last_hidden_state"
"""Output of an encoder with a state for each token, of which embeddings are made."""
Mode = Literal["cls", "mean", "last"]


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one embedding.

    Args:
        mode: the first token's state, the mean of all, or the last one's.
        normalize: whether embeddings have length 1.
        prompt: text before each text.
        dimensions: sizes to which embeddings may be cut (Matryoshka); none by default.
    """

    mode: Mode
    normalize: bool = True
    prompt: str = ""
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextFacts:
    """What a bundle records about text beside the tokenizer.

    Args:
        special_tokens: variables of chat templates: bos_token, eos_token, ...
        templates: name -> Jinja source; "default" is the one for any conversation.
        sampling: values of `Sampling` by name that differ from greedy choice.
        stop_tokens: tokens that end a sequence.
        max_new_tokens: default number of tokens to generate; None if the model has none.
        clean_up: whether spaces before punctuation are removed from decoded text.
        token_types: whether the model tells the second text of a pair by its token types.
        pooling: how embeddings are made; None for a model without.
        labels: classes of the base's head; None for a model without.
        most_tokens: tokens of a text at most; None where no limit is known.
    """

    special_tokens: Mapping[str, str | list[str]] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, int | float | list[str]] = field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    clean_up: bool = False
    token_types: bool = False
    pooling: Pooling | None = None
    labels: HeadLabels | None = None
    most_tokens: int | None = None

    @classmethod
    def read(cls, bundle: Bundle) -> TextFacts:
        """Read the facts of a bundle.

        Raises:
            IntegrityError: the file is damaged.
        """
        try:
            return msgspec.json.decode(bundle.check_file(f"text/{FACTS}").read_bytes(), type=cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise IntegrityError(f"read {FACTS} of bundle {bundle.path}", problem=str(error)) from error


def write_text(place: Path, tokenizer: str, facts: TextFacts, image: ImageFacts | None = None) -> dict[str, FileRecord]:
    """Write the folder; returns the records for the manifest.

    Args:
        place: folder to make.
        tokenizer: text of tokenizer.json.
        facts: further facts to record.
        image: preparation of images.
    """
    place.mkdir()
    texts = {TOKENIZER: tokenizer, FACTS: _document(facts)}
    if image is not None:
        texts[IMAGE] = _document(image)
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    return {name: FileRecord(digest_file(place / name), (place / name).stat().st_size) for name in texts}


def _document(facts: TextFacts | ImageFacts) -> str:
    return json.dumps(asdict(facts), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

"""Real sentences of installed packages, tasks made of them, and a tokenizer: GLUE's shapes without a download."""

from __future__ import annotations

import pydoc_data.topics
import random
import re
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft.utils.warning import PeftWarning
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
Example = tuple[tuple[str, ...], float]  # a text or a pair of texts, and the label


@cache
def documents() -> dict[str, list[list[str]]]:
    """Sentences of each document, of Python's documentation ("python") and of scikit-learn's data sets ("data").

    A sentence that several documents share is in the first one only.
    """
    seen: set[str] = set()
    described = sorted(files("sklearn.datasets.descr").iterdir(), key=lambda part: part.name)
    data = [part.read_text(encoding="utf-8") for part in described if part.name.endswith(".rst")]
    texts = {"python": [*pydoc_data.topics.topics.values()], "data": data}
    return {source: [found for text in own if (found := _sentences(text, seen))] for source, own in texts.items()}


def split(*, held: bool) -> dict[str, list[list[str]]]:
    """A third of the documents of each source, held out from training; or the others."""
    chosen = (1,) if held else (0, 2)
    return {source: [own for at, own in enumerate(group) if at % 3 in chosen] for source, group in documents().items()}


def _sentences(text: str, seen: set[str]) -> list[str]:
    plain = re.sub(r"[*`_:|=~\\]+|\s+", " ", text)
    found = (" ".join(part.split()) for part in re.split(r"(?<=[.!?]) +(?=[A-Z])", plain))
    kept = (part for part in found if re.fullmatch(r"[A-Z][\w ,;'()-]+\.", part) and 5 <= len(part.split()) <= 24)
    new = [part for part in dict.fromkeys(kept) if part not in seen]
    seen.update(new)
    return new


def similarity(count: int, *, held: bool) -> list[Example]:
    """Pairs as in STS-B: a sentence, a part of its words, and 5 times their share."""
    chosen = random.Random(0)
    sentences = [own for group in split(held=held).values() for document in group for own in document]
    made: list[Example] = []
    for first in chosen.sample(sentences, count):
        share = chosen.random()
        kept = [word for word in first.split() if chosen.random() < share] or first.split()[:1]
        made.append(((first, " ".join(kept)), 5 * len(kept) / len(first.split())))
    return made


def sources(count: int, *, held: bool) -> list[Example]:
    """Single texts with two classes as in SST-2: does a sentence describe data (1) or Python (0)?"""
    chosen = random.Random(0)
    groups = [[own for document in group for own in document] for group in split(held=held).values()]
    return [((chosen.choice(groups[at % 2]),), at % 2) for at in range(count)]


def inference(count: int, *, held: bool) -> list[Example]:
    """Pairs with three classes as in MNLI: a part of the sentence, another sentence, or its negation."""
    chosen = random.Random(0)
    sentences = [own for group in split(held=held).values() for document in group for own in document]
    stated = [own for own in sentences if re.search(r" (is|are|can) ", own)]
    made: list[Example] = []
    for at in range(count):
        premise = chosen.choice(stated)
        half = " ".join(premise.split()[: len(premise.split()) // 2])
        negated = re.sub(r" (is|are|can) ", r" \1 not ", premise, count=1)
        made.append(((premise, (half, chosen.choice(sentences), negated)[at % 3]), at % 3))
    return made


def tokenizer(size: int, *, types: bool = False) -> PreTrainedTokenizerFast:
    """Train a tokenizer of word pieces with the special tokens of BERT and DeBERTa; padding is token 0.

    Args:
        size: number of tokens, at most.
        types: whether texts of a pair have different token types, as BERT takes them.
    """
    texts = (own for group in documents().values() for document in group for own in document)
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL], show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names: dict[str, Any] = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    names["model_input_names"] = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save(model: Any, place: Path) -> None:
    """Save an adapter, and a config.json with the labels of its head."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*zero-sized", PeftWarning)  # layers that AdaLoRA left no rank
        model.save_pretrained(str(place))
    model.base_model.model.config.save_pretrained(str(place))


def encoded(tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Tokens of texts and pairs in one batch, padded to the longest."""
    rows = [tokenizer(*own) for own in texts]
    return dict(tokenizer.pad(rows, return_tensors="pt"))


def train(model: Any, tokenizer: Any, examples: Sequence[Example], steps: int, rate: float, rows: int = 4) -> float:
    """Train the adapter and the head of a model for a few steps, and return the last step's loss."""
    optimiser = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=rate)
    model.train()
    loss = torch.zeros(())
    for step in range(steps):
        batch = [examples[(step * rows + row) % len(examples)] for row in range(rows)]
        targets = torch.tensor([label for _, label in batch])
        inputs = encoded(tokenizer, [texts for texts, _ in batch])
        kind = targets.dtype if model.config.num_labels == 1 else torch.long
        loss = model(**inputs, labels=targets.to(kind)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA moves ranks between layers
            model.base_model.update_and_allocate(step)
    model.eval()
    return float(loss.detach())

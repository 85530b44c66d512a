"""DeBERTaV3 with three tasks of GLUE's shapes, each with its adapter's method and head, in one ragged batch.

    python -m examples.families.deberta --out DIRECTORY [--full]

STS-B's shape is a regression (one output, LoRA), SST-2's two classes (AdaLoRA), MNLI's three (Tucker).  Tasks are made
of real sentences of installed packages, and trained for a few steps from random weights: the figures show exactness,
memory and time, not quality.  `--full` has the configuration of deberta-v3-base: 184 million weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from examples.families.answers import LIMIT, adapted, error
from examples.families.figures import measuring, options, record
from examples.families.sentences import Example, encoded, inference, save, similarity, sources, train
from examples.families.sentences import tokenizer as make_tokenizer
from examples.families.serving import ask, measure, serving
from examples.families.text_figures import exported, quiet, text_forms, worst
from tpeft_deploy import Adapter, Runtime, export_bundle, load_adapter
from tpeft_deploy.training import TuckerConfig
from tpeft_deploy.tucker import Array

TARGETS = ["query_proj", "key_proj", "value_proj", "dense"]
STEPS = 4
HEAD = ["classifier"]
FULL: dict[str, Any] = {
    "vocab_size": 128_100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "position_buckets": 256, "max_position_embeddings": 512, "layer_norm_eps": 1e-7,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "position_buckets": 16, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class GlueTask:
    """A task: examples, the adapter's method, and the classes of the head."""

    examples: Callable[..., list[Example]]
    method: Callable[[int], PeftConfig]
    head: dict[str, Any]


def _lora(steps: int) -> PeftConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=HEAD)


def _adalora(steps: int) -> PeftConfig:
    ranks: Any = {"init_r": 8, "target_r": 4, "tinit": 1, "tfinal": 1, "total_step": steps}
    return AdaLoraConfig(lora_alpha=16, target_modules=TARGETS, modules_to_save=HEAD, **ranks)


def _tucker(steps: int) -> PeftConfig:
    config: PeftConfig = TuckerConfig(ranks=8, target_modules=TARGETS, modules_to_save=HEAD)
    return config


TASKS = {
    "stsb": GlueTask(similarity, _lora, {"num_labels": 1, "problem_type": "regression"}),
    "sst2": GlueTask(sources, _adalora, {"id2label": {0: "python", 1: "data"}}),
    "mnli": GlueTask(inference, _tucker, {"id2label": {0: "entailment", 1: "neutral", 2: "contradiction"}}),
}


def base_model(*, full: bool) -> DebertaV2ForSequenceClassification:
    """DeBERTaV3 with random weights and two classes."""
    sizes = FULL if full else SMALL
    config = DebertaV2Config(
        **sizes, pooler_hidden_size=sizes["hidden_size"], relative_attention=True, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", max_relative_positions=-1, position_biased_input=False,
        type_vocab_size=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return DebertaV2ForSequenceClassification(config).eval()


def trained(name: str, tokenizer: Any, place: Path) -> Any:
    """Train the adapter and the new head of a task, save them, and return the model with them merged by PEFT."""
    task = TASKS[name]
    torch.manual_seed(sum(name.encode()))
    kind = DebertaV2ForSequenceClassification
    base = kind.from_pretrained(place / "base", ignore_mismatched_sizes=True, **task.head)
    model = adapted(base, task.method(STEPS))
    train(model, tokenizer, task.examples(32, held=False), STEPS, 2e-2)
    save(model, place / name)
    return model.merge_and_unload()


Row = tuple[str, tuple[str, ...]]  # a task, and a text or a pair of texts


def rows_of_tasks(count: int) -> list[Row]:
    """Rows of the tasks and the base in turn, of different lengths."""
    given = {name: [texts for texts, _ in task.examples(count, held=True)] for name, task in TASKS.items()}
    given["base"] = given["sst2"]
    return [(name, given[name][at]) for at in range(count) for name in given]


def alone(model: Any, tokenizer: Any, name: str, rows: list[Row]) -> dict[Row, Array]:
    """Logits of the rows of a task, each alone and without padding, from a model of transformers."""
    with torch.no_grad():
        return {row: model(**encoded(tokenizer, [row[1]])).logits[0].numpy() for row in rows if row[0] == name}


def pooled(model: Any, text: dict[str, torch.Tensor]) -> Array:
    """States that the head reads."""
    with torch.no_grad():
        found: Array = model.pooler(model.deberta(**text)[0]).numpy()
    return found


def build(place: Path, tokenizer: Any, rows: list[Row], *, full: bool) -> tuple[dict[str, Adapter], list[Array]]:
    """Make the base, train the tasks, and read their adapters; returns PEFT's logits of the rows, merged, too."""
    base = base_model(full=full)
    base.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    found = alone(base, tokenizer, "base", rows)
    for name in TASKS:
        model = trained(name, tokenizer, place)
        found |= alone(model, tokenizer, name, rows)
        text = encoded(tokenizer, [next(texts for task, texts in rows if task == name)])
        assert error(pooled(model, text), pooled(base, text)) > 100 * LIMIT, f"{name} changes next to nothing"
    return {name: load_adapter(place / name, base=base) for name in TASKS}, [found[row] for row in rows]


async def joined(runtime: Runtime, tokenizer: Any, rows: list[Row]) -> list[Array]:
    """Logits of all rows from concurrent requests, which the runtime pads and joins."""

    async def one(name: str, texts: tuple[str, ...]) -> Array:
        inputs = {key: own.numpy() for key, own in encoded(tokenizer, [texts]).items()}
        found: Array = (await runtime.infer(inputs, name))["logits"][0]
        return found

    return await asyncio.gather(*(one(name, texts) for name, texts in rows))


def given(texts: tuple[str, ...]) -> str | dict[str, str]:
    """A text or a pair of texts as requests have it."""
    return texts[0] if len(texts) == 1 else {"text": texts[0], "text_pair": texts[1]}


def classified(client: httpx.Client, rows: list[Row], wanted: list[Array]) -> float:
    """Ask the server for the classes of all rows; returns the largest error of a probability or a value."""
    worst = 0.0
    for name in (*TASKS, "base"):
        own = [(texts, logits) for (task, texts), logits in zip(rows, wanted, strict=True) if task == name]
        found = ask(client, "/v1/classify", model=name, input=[given(texts) for texts, _ in own])
        for answer, (_, logits) in zip(found, own, strict=True):
            if name == "stsb":
                worst = max(worst, error(np.array(answer["values"]), logits))
                continue
            shares = np.exp(logits - logits.max())
            worst = max(worst, error(np.array(answer["probs"]), shares / shares.sum()))
            names = [*TASKS[name].head["id2label"].values()] if name in TASKS else ["LABEL_0", "LABEL_1"]
            assert (answer["labels"], answer["label"]) == (names, names[int(logits.argmax())])
    return worst


def run(place: Path, *, full: bool) -> dict[str, Any]:
    """Train, export, check every answer against PEFT's, and measure."""
    quiet()
    tokenizer = make_tokenizer(8000 if full else SMALL["vocab_size"])
    rows = rows_of_tasks(4 if full else 2)
    tasks = [name for name, _ in rows]
    adapters, wanted = build(place, tokenizer, rows, full=full)
    with measuring() as cost:
        bundle = export_bundle(place / "base", adapters, place / "bundle")
    inputs = {name: own.numpy() for name, own in encoded(tokenizer, [texts for _, texts in rows]).items()}
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        answers = runtime.run(inputs, tasks=tasks)["logits"]
        apart = asyncio.run(joined(runtime, tokenizer, rows))
    assert [own.shape for own in answers] == [own.shape for own in wanted]  # a row has the columns of its own task
    errors = {"one run": worst(answers, wanted), "joined requests": worst(apart, wanted)}
    with serving(bundle.path, place / "served") as client:
        errors["server"] = classified(client, rows, wanted)
        bodies: list[dict[str, Any]] = [{"model": name, "input": given(texts)} for name, texts in rows]
        served = measure(client, "/v1/classify", bodies, 5 if full else 0)
    figures = exported(bundle, cost, errors) | {f"server, {what}": value for what, value in served.items()}
    return figures | {"Runs, ms": text_forms(bundle, inputs, tasks, (1, 4, len(rows)), 10 if full else 0)}


if __name__ == "__main__":
    chosen = options(__doc__)
    record("deberta", run(chosen.out, full=chosen.full), chosen.full)

"""What the examples of generation share: tokens of merged models, sequences side by side, and tokens per second."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from transformers.generation import GenerationMixin

from examples.families.answers import adapted, merged
from examples.families.figures import gate, measuring
from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter

SLOTS = 3


@dataclass
class Row:
    """A sequence: its task, prompt and inputs without the batch axis of an encoder."""

    task: str
    prompt: list[int]
    inputs: dict[str, Any] | None


@dataclass
class Answer:
    """Tokens of a merged model, their log-probabilities, and the smallest lead of a token over the next best."""

    tokens: list[int]
    logprobs: list[float]
    lead: float


def merge(load: Callable[[], Any], config: PeftConfig, place: Path, seed: int) -> Any:
    """Give a model a random adapter, save it, and return the model with it merged by PEFT."""
    torch.manual_seed(seed)
    return merged(adapted(load(), config), place)


def answer(model: Any, given: Mapping[str, Any], prompt: Sequence[int], count: int) -> Answer:
    """Let a model of transformers generate greedily."""
    options = {"do_sample": False, "max_new_tokens": count, "return_dict_in_generate": True, "output_logits": True}
    # Whisper's generate takes windows of long sounds apart, and calls this one for each.
    found = GenerationMixin.generate(model, **given, **options)
    logits = torch.cat(found.logits).double()
    tokens = found.sequences[0, len(prompt) :].tolist()
    best = logits.topk(2).values
    lead = float((best[:, 0] - best[:, 1]).min())
    return Answer(tokens, logits.log_softmax(-1)[range(len(tokens)), tokens].tolist(), lead)


def exported(place: Path, tasks: Sequence[str]) -> tuple[Bundle, dict[str, Any]]:
    """Export the directories of the base and of the tasks for generation, with what that cost."""
    adapters = {name: load_adapter(place / name, base=str(place / "base")) for name in tasks}
    with measuring() as export:
        bundle = export_bundle(str(place / "base"), adapters, place / "bundle", generation=True)
    size = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
    return bundle, {
        "components": ", ".join(bundle.components), "export, s": export.seconds,
        "export, MB at most beside what the process held": export.megabytes, "bundle, MB": size / 2**20,
        "errors at export": gate(bundle),
    }  # fmt: skip


def compared(runtime: Runtime, rows: Sequence[Row], wanted: Sequence[Answer], count: int) -> dict[str, Any]:
    """Generate the rows in one call and as streams side by side: tokens must be those of the merged models."""
    expected = [own.tokens for own in wanted]
    assert len({tuple(own) for own in expected}) == len(rows), "rows must differ, or their order is not seen"
    assert generate(runtime, rows, count) == expected
    found = asyncio.run(_streamed(runtime, rows, count))
    assert [[token.id for token in own] for own in found] == expected
    pairs = zip(found, wanted, strict=True)
    return {
        "tokens of a row, equal to transformers'": count,
        "largest difference of log-probabilities": max(
            float(np.abs(np.subtract([token.logprob for token in own], other.logprobs)).max()) for own, other in pairs
        ),
        "smallest lead of a token over the next": min(own.lead for own in wanted),
    }


async def _streamed(runtime: Runtime, rows: Sequence[Row], count: int) -> list[list[Any]]:
    async def one(row: Row) -> list[Any]:
        options: Any = {"inputs": row.inputs, "max_new_tokens": count}
        return [token async for token in runtime.stream(row.prompt, row.task, **options)]

    return await asyncio.gather(*map(one, rows))


def generate(runtime: Runtime, rows: Sequence[Row], count: int) -> list[list[int]]:
    """Generate rows of any tasks in one call."""
    options: Any = {"tasks": [row.task for row in rows], "inputs": [row.inputs for row in rows]}
    return runtime.generate([row.prompt for row in rows], **options, max_new_tokens=count)


def costs(runtime: Runtime, rows: Sequence[Row], count: int, rounds: int = 3) -> list[dict[str, Any]]:
    """Return time to the first tokens and tokens per second after them: of the base, a task, and all tasks mixed.

    From the second round on, what a runtime keeps of a prompt's beginning is used again.
    """
    task = next(row.task for row in rows if row.task != "base")
    cases = {"base": ["base"] * len(rows), "one task": [task] * len(rows), "mixed tasks": [row.task for row in rows]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, tasks in cases.items():
            own = [Row(chosen, row.prompt, row.inputs) for chosen, row in zip(tasks, rows, strict=True)]
            times[name].append(asyncio.run(_timed(runtime, own, count)))
    found = []
    for name, measured in times.items():
        first, rate = (statistics.median(values) for values in zip(*measured, strict=True))
        found.append({"rows": f"{len(rows)}, {name}", "first tokens, s": first, "tokens/s after them": rate})
    return found


async def _timed(runtime: Runtime, rows: Sequence[Row], count: int) -> tuple[float, float]:
    """Return the seconds until every row has a token, and the tokens of a second from then on."""

    async def one(row: Row) -> list[float]:
        options: Any = {"inputs": row.inputs, "max_new_tokens": count}
        return [time.perf_counter() async for _ in runtime.stream(row.prompt, row.task, **options)]

    began = time.perf_counter()
    arrived = await asyncio.gather(*map(one, rows))
    started = max(own[0] for own in arrived)
    later = [moment for own in arrived for moment in own if moment > started]
    return started - began, len(later) / (max(later) - started)

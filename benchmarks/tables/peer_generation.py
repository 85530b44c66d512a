"""Sequences of several adapters, as each toolkit that generates in a process does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from benchmarks.generation import PROMPT, SMALL, exported, model, opened, with_genai
from benchmarks.tables.peer_cases import OURS, Answer, Batch, Inputs
from tpeft_deploy.tucker import Array

__all__ = ["answers", "oracle"]

NEW = 16  # tokens
GENAI = "onnxruntime-genai, set_active_adapter"
INSTALL = "not installed: pip install onnxruntime-genai==0.18.0"


class Generation:
    """A Llama with adapters.

    Args:
        cache: directory of exported bundles.
        rows: sequences that are generated together.
        tasks: number of adapters.
        sizes: sizes of the model.
    """

    def __init__(self, cache: Path, rows: int, tasks: int, sizes: Mapping[str, int] = SMALL) -> None:
        self.tasks = [f"t{number}" for number in range(tasks)]
        self.bundle = exported(cache, sizes, self.tasks)
        self.end = sizes["vocab_size"] - 1
        self.prompts = np.random.default_rng(0).integers(self.end, size=(rows, PROMPT))
        self.cache, self.sizes = cache, sizes
        place = self.bundle.path.parent
        first, *others = self.tasks
        self.peft: Any = PeftModel.from_pretrained(model(sizes), str(place / first), adapter_name=first).eval()
        for task in others:
            self.peft.load_adapter(str(place / task), adapter_name=task)

    def batch(self, count: int) -> Batch:
        tasks = [self.tasks[row % count] for row in range(len(self.prompts))]
        return Batch({"prompts": self.prompts}, tasks)


@torch.inference_mode()
def _generate(peft: Any, prompts: Array, **more: Any) -> Array:
    rows = torch.from_numpy(prompts)
    found = peft.generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=NEW, **more
    )
    tokens: Array = found[:, prompts.shape[1] :].numpy()
    return tokens


def _chosen(peft: Any, task: str, inputs: Inputs) -> Array:
    peft.set_adapter(task)
    return _generate(peft, inputs["prompts"])


def oracle(work: Generation, batch: Batch) -> Array:
    """PEFT's tokens, each row alone with its adapter set."""
    found = []
    for prompt, task in zip(work.prompts, batch.tasks, strict=True):
        found.append(_chosen(work.peft, task, {"prompts": prompt[None]}))
    return np.concatenate(found)


@contextmanager
def answers(work: Generation, batch: Batch, threads: int) -> Iterator[dict[str, Answer | str]]:
    """Name -> how a toolkit generates the batch, or, in words, why it does not."""
    prompts, names = work.prompts.tolist(), list(batch.tasks)
    with opened(work.bundle, threads, len(prompts), PROMPT + NEW) as runtime:
        yield {
            OURS: lambda: np.array(runtime.generate(prompts, tasks=names, max_new_tokens=NEW)),
            GENAI: _genai(work, batch, threads),
            "PEFT, set_adapter": batch.groups({task: partial(_chosen, work.peft, task) for task in batch.distinct}),
            "PEFT, adapter_names": lambda: _generate(work.peft, work.prompts, adapter_names=names),
        }


def _genai(work: Generation, batch: Batch, threads: int) -> Answer | str:
    if find_spec("onnxruntime_genai") is None:
        return INSTALL
    # It stops at an end token only, which the other bundle's model has not.
    bundle = exported(work.cache, work.sizes, work.tasks, end=work.end)
    generate = with_genai(bundle, work.tasks, threads, NEW)

    def one(task: str, inputs: Inputs) -> Array:
        return np.array(generate(task, inputs["prompts"].tolist()))

    return batch.groups({task: partial(one, task) for task in batch.distinct})

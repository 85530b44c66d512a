"""Tokens in a second: rows of the base, of one task, and of different tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.runtime.bench.measure import Case, interleave, spread
from tpeft_deploy.runtime.bench.results import GenerationCost
from tpeft_deploy.runtime.runtime import Runtime
from tpeft_deploy.tucker import Array

__all__ = ["GENERATED", "generation_costs"]

GENERATED = {"base": "rows of the base", "one task": "rows of one task", "mixed": "rows of different tasks"}
_PROMPT, _NEW = 16, 32  # tokens, where there is room for them


def generation_costs(
    bundle: Bundle, runtime: Runtime, tasks: Sequence[str], rows: int, seconds: float
) -> list[GenerationCost]:
    """Return the tokens of each case in a second; none where the bundle generates nothing.

    Args:
        bundle: gives the example inputs of an encoder.
        runtime: runtime of the bundle.
        tasks: tasks that take turns.
        rows: sequences that run together.
        seconds: for all cases.
    """
    decoder = next((part for part in bundle.components.values() if part.manifest.decoder is not None), None)
    if decoder is None or decoder.manifest.decoder is None:
        return []
    ports = decoder.manifest.decoder
    sources = [_example(bundle.components[ports.source])] * rows if ports.memory else None
    room = runtime.most_tokens
    new = min(_NEW, max(1, room // 2))
    draw = np.random.default_rng(0)
    length = 0 if ports.memory else min(_PROMPT, room - new)
    usual = np.setdiff1d(np.arange(min(ports.vocabulary, 1000)), [ports.placeholder or 0])  # no place of an image
    prompts = draw.choice(usual, size=(rows, length)).tolist()
    own = [task for task in tasks if task in bundle.tasks]
    mixed = [tasks[row % len(tasks)] for row in range(rows)]
    named = {"base": ["base"] * rows, **({"one task": own[:1] * rows, "mixed": mixed} if own else {})}
    made = dict.fromkeys(named, 0)

    def case(name: str) -> Case:
        def run() -> None:
            found = runtime.generate(prompts, tasks=named[name], inputs=sources, max_new_tokens=new)
            made[name] = sum(map(len, found))

        return run

    times = interleave({name: case(name) for name in named}, seconds)
    return [
        GenerationCost(name, rows, spread([made[name] / second for second in taken]), len(taken))
        for name, taken in times.items()
    ]


def _example(encoder: Bundle) -> Mapping[str, Array]:
    """Return an encoder's example inputs of one sequence."""
    return {name: array[0] for name, array in encoder.example().items()}

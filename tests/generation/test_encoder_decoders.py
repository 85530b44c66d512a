"""Encoder-decoders: sequences of several tasks and sources join and leave, as `generate` of each merged PEFT model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.exporters.small_encoder_decoders import START, generated, made, source, trained
from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.errors import InputError

TASKS = ["a", "b", "c", "d"]
# Sequence -> its source and task, and the part of the tokens that it asks for: three run at a time.
SEQUENCES = [(0, 1.0), (1, 0.3), (2, 0.6), (3, 1.0), (1, 1.0), (2, 1.0), (0, 0.4), (3, 0.1)]
COUNTS = [
    pytest.param("t5", 32, marks=pytest.mark.thorough),
    *(pytest.param(name, 32, marks=pytest.mark.soak) for name in ("bart", "whisper")),
]
LONG = [pytest.param(name, 128, marks=pytest.mark.soak) for name in ("t5", "bart", "whisper")]
Inputs = dict[str, Any]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(("name", "count"), [*COUNTS, *LONG])
def test_rows_generate_what_their_merged_models_do(tmp_path: Path, name: str, count: int) -> None:
    paths, model = trained(name, tmp_path, tasks=TASKS), made(name)
    given: list[Inputs] = [source(name, row) for row in range(len(TASKS))]
    model.save_pretrained(tmp_path / "base")
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(tmp_path / "base", adapters, tmp_path / "bundle", generation=True)
    merged = [generated(name, paths[task], inputs, [START], count) for task, inputs in zip(TASKS, given, strict=True)]
    expected = [tokens for tokens, _ in merged]
    with three_slots(bundle.path) as runtime:
        found = asyncio.run(streamed(runtime, given, count))
        for (row, part), tokens in zip(SEQUENCES, found, strict=True):
            length = max(1, int(part * count))
            assert [token.id for token in tokens] == expected[row][:length]
            logits = torch.tensor(merged[row][1][:length]).double()
            wanted = logits.log_softmax(-1)[range(length), expected[row][:length]]
            np.testing.assert_allclose([token.logprob for token in tokens], wanted, rtol=1e-4, atol=1e-4)
        assert runtime.generate(inputs=given, tasks=TASKS, max_new_tokens=count) == expected
        begun = [[START, *tokens[:5]] for tokens in expected]
        rest = runtime.generate(begun, tasks=TASKS, inputs=given, max_new_tokens=count - 5)
        assert rest == [tokens[5:] for tokens in expected]
        usage = runtime.usage()
        assert (usage["slots"], usage["slots_taken"]) == (3, 0)
        check_refusals(runtime, given, expected[0][:20])


def check_refusals(runtime: Runtime, given: list[Inputs], expected: list[int]) -> None:
    """One sequence is refused in one line, and its neighbour goes on."""
    name, value = next(iter(given[1].items()))
    for wrong, message in [
        (None, "expected inputs of component 'encoder'"),
        ({**given[1], "pixels": value}, "unknown 'pixels'"),
        ({**given[1], name: value[None]}, "expected shape"),
    ]:
        found = asyncio.run(beside(runtime, given[0], wrong))
        assert [token.id for token in found[0]] == expected
        assert isinstance(found[1], InputError)
        assert message in str(found[1])
        assert "\n" not in str(found[1])


async def beside(runtime: Runtime, given: Inputs, wrong: Inputs | None) -> list[Any]:
    both = (one(runtime, "a", given, 20), one(runtime, "b", wrong, 20))
    return [*await asyncio.gather(*both, return_exceptions=True)]


def three_slots(path: Path) -> Runtime:
    with Runtime(path, provider="cpu", preload=False) as runtime:
        plan = runtime._generation._plan
        assert plan is not None
    return Runtime(path, provider="cpu", threads=1, kv_bytes=3 * plan.nbytes // plan.slots)


async def one(runtime: Runtime, task: str, inputs: Inputs | None, length: int) -> list[Any]:
    return [token async for token in runtime.stream(task=task, inputs=inputs, max_new_tokens=length)]


async def streamed(runtime: Runtime, given: list[Inputs], count: int) -> list[list[Any]]:
    return await asyncio.gather(
        *(one(runtime, TASKS[row], given[row], max(1, int(part * count))) for row, part in SEQUENCES)
    )

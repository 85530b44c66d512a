"""Sequences of several tasks that join and leave: the tokens of `generate` of each one's merged PEFT model."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.exporters.small_decoders import MODELS, generated, made, trained
from tpeft_deploy import Bundle, Runtime, Sampling, export_bundle, load_adapter
from tpeft_deploy.bundle.directory import BANKED_ROWS
from tpeft_deploy.runtime.generation.top_logits.device_logits import TopLogits
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs

POSITIONS = 256
PROMPTS = [[5, 9, 31, 7, 12, 40, 3, 22, 8], [17, 2, 33], [1, 44, 6, 25, 38]]
TASKS = ["a", "base", "b"]
# Sequence -> its prompt and task, and the part of the tokens that it asks for: three run at a time.
SEQUENCES = [(0, 1.0), (1, 0.3), (2, 0.6), (1, 1.0), (2, 1.0), (0, 0.4)]
THOROUGH = dict.fromkeys(["gemma3", "mixtral", "phi"], pytest.mark.thorough)
COUNTS = [pytest.param(name, 128 if name == "llama" else 32, marks=THOROUGH.get(name, ())) for name in MODELS]
LONG = [pytest.param(name, 128, marks=pytest.mark.soak) for name in MODELS if name != "llama"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(("name", "count"), [*COUNTS, *LONG])
def test_rows_generate_what_their_merged_models_do(tmp_path: Path, name: str, count: int) -> None:
    paths = trained(name, tmp_path, POSITIONS)
    model = made(name, POSITIONS)
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(model, adapters, tmp_path / "bundle", generation=True)
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    assert BANKED_ROWS in bundle.manifest.files
    operators = [node.op_type for node in onnx.load(bundle.path / BANKED_ROWS, load_external_data=False).graph.node]
    layers = 0 if name == "gpt2" else model.config.num_hidden_layers
    assert operators.count("RotaryEmbedding") == 2 * layers
    assert type(model) is type(made(name))
    assert model.config._attn_implementation == "sdpa"
    assert {record["oracle"].split()[0] for record in bundle.manifest.oracles.values()} == {"peft"}
    expected = [
        generated(name, paths.get(task), prompt, count, POSITIONS) for task, prompt in zip(TASKS, PROMPTS, strict=True)
    ]
    with three_slots(bundle.path) as runtime:
        found = asyncio.run(streamed(runtime, count))
        for (row, part), own in zip(SEQUENCES, found, strict=True):
            tokens, logits = expected[row]
            length = max(1, int(part * count))
            assert [token.id for token in own] == tokens[:length]
            wanted = torch.tensor(logits[:length]).double().log_softmax(-1)[range(length), tokens[:length]]
            np.testing.assert_allclose([token.logprob for token in own], wanted, rtol=1e-4, atol=1e-4)
        assert runtime.generate(PROMPTS, tasks=TASKS, max_new_tokens=count) == [tokens for tokens, _ in expected]
        assert runtime.usage()["slots_taken"] == 0


def test_a_graph_that_reads_banks_generates_the_same(llama_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found, copied = [], []
    for graphs in (ServedGraphs.on("cpu", llama_bundle.manifest), ServedGraphs("banked.onnx")):
        monkeypatch.setattr(ServedGraphs, "on", lambda *_, graphs=graphs: graphs)
        with three_slots(llama_bundle.path) as runtime:
            found.append(runtime.generate(PROMPTS * 2, tasks=TASKS * 2, max_new_tokens=12))
            copied.append(runtime.usage()["slot_adapter_bytes"])
    assert found[0] == found[1]
    assert copied[0] > copied[1] == 0


def three_slots(path: Path) -> Runtime:
    with Runtime(path, provider="cpu", preload=False) as runtime:
        plan = runtime._generation._plan
        assert plan is not None
    return Runtime(path, provider="cpu", threads=1, kv_bytes=3 * plan.nbytes // plan.slots)


async def streamed(runtime: Runtime, count: int) -> list[list[Any]]:
    async def one(row: int, part: float) -> list[Any]:
        length = max(1, int(part * count))
        return [token async for token in runtime.stream(PROMPTS[row], TASKS[row], max_new_tokens=length)]

    return await asyncio.gather(*(one(row, part) for row, part in SEQUENCES))


SAMPLINGS = [
    Sampling(),
    Sampling(logprobs=3),
    Sampling(temperature=0.8, top_p=0.7, seed=3),
    Sampling(temperature=1.2, top_k=5, seed=4, logprobs=2),
    Sampling(temperature=1.0, seed=5),
    Sampling(repetition_penalty=1.2),
]


def test_logits_that_stay_on_the_device_give_the_same_tokens(
    llama_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = llama_bundle.manifest.decoder
    assert ports is not None
    assert ports.choice in llama_bundle.manifest.files
    copied: Counter[str] = Counter()
    for call in ("run", "read"):
        own = getattr(TopLogits, call)
        monkeypatch.setattr(TopLogits, call, lambda *given, call=call, own=own: (copied.update([call]), own(*given))[1])

    async def all_of(runtime: Runtime, samplings: list[Sampling]) -> list[list[Any]]:
        async def one(place: int, how: Sampling) -> list[Any]:
            prompt, task = PROMPTS[place % 3], TASKS[place % 2]
            return [token async for token in runtime.stream(prompt, task, max_new_tokens=20, sampling=how)]

        return await asyncio.gather(*(one(*pair) for pair in enumerate(samplings)))

    found = []
    for kept in (False, True):
        with three_slots(llama_bundle.path) as runtime:
            assert not runtime._generation.device_choice
            runtime._generation.device_choice = kept
            greedy = asyncio.run(all_of(runtime, SAMPLINGS[:2]))
            assert copied == ({"run": copied["run"]} if kept else {})
            found.append(greedy + asyncio.run(all_of(runtime, SAMPLINGS)))
    assert copied["run"] > 20
    assert copied["read"] > 0
    for host, device in zip(*found, strict=True):
        assert [token.id for token in host] == [token.id for token in device]
        np.testing.assert_allclose([t.logprob for t in host], [t.logprob for t in device], rtol=1e-4, atol=1e-5)
        assert [[id for id, _ in token.top] for token in host] == [[id for id, _ in token.top] for token in device]


def test_a_bundle_of_an_earlier_version_copies_logits(llama_bundle: Bundle) -> None:
    with three_slots(llama_bundle.path) as runtime:
        service = runtime._generation
        service.device_choice = True
        service._open_choice = lambda: None  # as for a manifest without the field
        tokens = runtime.generate(PROMPTS, tasks=TASKS, max_new_tokens=4)
        assert service._decoder is not None
        assert service._decoder.top is None
    with three_slots(llama_bundle.path) as runtime:
        assert tokens == runtime.generate(PROMPTS, tasks=TASKS, max_new_tokens=4)

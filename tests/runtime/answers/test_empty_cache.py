"""A decoder whose first step has nothing in its cache: step by step against transformers itself."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters.hugging_face import TEXT, saved
from tests.helpers.server.in_process import over_grpc, over_rest
from tests.server.conftest import serve
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle
from tpeft_deploy.errors import InputError
from tpeft_deploy.exporters import verify_bundle
from tpeft_deploy.tucker import Array

TASKS = ["base", "poet"]
PROMPTS = np.array([[3, 1, 4], [1, 5, 9]])
Step = Callable[[dict[str, Array]], Mapping[str, Any]]
Ask = Callable[..., dict[str, Array]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    return saved(path, "LlamaForCausalLM", **TEXT | {"num_key_value_heads": 1})


def plain(folder: Path) -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


@pytest.fixture(scope="module")
def poet(folder: Path) -> Adapter:
    attention = {f"model.layers.0.self_attn.{name}_proj.weight": (3, 3) for name in "qv"}
    return nets.adapter_for(plain(folder), {**attention, "lm_head.weight": (2, 2)}, seed=3)


@pytest.fixture(scope="module")
def llama(folder: Path, poet: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(folder, {"poet": poet}, tmp_path_factory.mktemp("bundle") / "llama", folded=True)


def wanted(folder: Path, adapter: Adapter | None, prompt: Array, steps: int) -> tuple[list[int], list[Array]]:
    """The greedy tokens of transformers' own forward with merged weights, and the logits of every step."""
    model = plain(folder)
    with torch.no_grad():
        for name, delta in (adapter.deltas if adapter is not None else {}).items():
            weight = model.get_parameter(name)
            weight.copy_((weight.double() + torch.from_numpy(delta.dense())).float())
        parameter = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache, ids = transformers.DynamicCache(), torch.from_numpy(prompt)[None]
        tokens, logits = [], []
        for _ in range(steps):
            found = model(input_ids=ids, use_cache=True, **{parameter: cache}).logits
            logits.append(found[0].numpy())
            tokens.append(int(found[0, -1].argmax()))
            ids = torch.tensor([tokens[-1:]])
    return tokens, logits


def empty(rows: int) -> dict[str, Array]:
    past = {f"past_key_values.0.{what}": np.zeros((rows, 1, 0, 8), np.float32) for what in ("key", "value")}
    return {"input_ids": PROMPTS[:rows], "attention_mask": np.ones((rows, 3), np.int64), **past}


def check_steps(folder: Path, poet: Adapter, step: Step, tasks: list[str], steps: int = 3) -> None:
    """Greedy decoding from an empty cache: every row as its merged model alone."""
    own = [wanted(folder, poet if task == "poet" else None, PROMPTS[row], steps) for row, task in enumerate(tasks)]
    inputs = empty(len(tasks))
    for at in range(steps):
        outputs = step(inputs)
        for row, (_, logits) in enumerate(own):
            difference = np.linalg.norm(outputs["logits"][row] - logits[at])
            assert difference <= 1e-5 * np.linalg.norm(logits[at])
        inputs["input_ids"] = np.asarray(outputs["logits"])[:, -1:].argmax(-1)
        assert inputs["input_ids"][:, 0].tolist() == [tokens[at] for tokens, _ in own]
        inputs["attention_mask"] = np.ones((len(tasks), 4 + at), np.int64)
        for what in ("key", "value"):
            inputs[f"past_key_values.0.{what}"] = np.asarray(outputs[f"present.0.{what}"])


def test_the_empty_cache_is_proved_for_every_form(llama: Bundle) -> None:
    assert llama.manifest.empty == ("past",)
    assert llama.manifest.rows == "each"
    proved = {check["form"] for check in llama.manifest.gate if check["sizes"].get("past") == 0}
    assert proved >= {"base", "factored", "banked", "mixed rows", "folded"}
    again = {check.form for check in verify_bundle(llama.path).checks if check.sizes.get("past") == 0}
    assert again >= {"base", "factored", "banked", "mixed rows", "folded"}


@pytest.mark.parametrize("tasks", [["base"], ["poet"], ["base", "poet"]])
def test_steps_from_nothing(folder: Path, poet: Adapter, llama: Bundle, tasks: list[str]) -> None:
    with Runtime(llama.path, provider="cpu", threads=1) as runtime:
        check_steps(folder, poet, lambda inputs: runtime.run(inputs, tasks=tasks), tasks)
        check_steps(folder, poet, lambda inputs: asyncio.run(runtime.infer(inputs, tasks=tasks)), tasks)

        async def both(inputs: dict[str, Array]) -> Mapping[str, Any]:
            """The rows as requests of their own, which may be joined."""
            rows = [{name: array[row : row + 1] for name, array in inputs.items()} for row in range(len(tasks))]
            found = await asyncio.gather(*(runtime.infer(row, task) for row, task in zip(rows, tasks, strict=True)))
            return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

        check_steps(folder, poet, lambda inputs: asyncio.run(both(inputs)), tasks)
        for name, shape in {"input_ids": (1, 0), "attention_mask": (0, 3)}.items():
            inputs = empty(1)
            inputs[name] = np.ones(shape, np.int64)
            with pytest.raises(InputError):
                runtime.run(inputs)


def test_a_pinned_task_and_fixed_buffers_take_it_too(folder: Path, poet: Adapter, llama: Bundle) -> None:
    from tests.helpers.runtime.banks import all_tasks
    from tpeft_deploy.runtime.sessions.cuda_graph import Captured
    from tpeft_deploy.runtime.sessions.factory import SessionFactory
    from tpeft_deploy.runtime.sessions.providers import Choice

    with Runtime(llama.path, provider="cpu", threads=1) as runtime:
        runtime.pin("poet", folded=True)
        check_steps(folder, poet, lambda inputs: runtime.run(inputs, "poet"), ["poet"])
    bank, rows = all_tasks(llama)
    captured = Captured(llama.path / "banked.onnx", SessionFactory(Choice("cpu", "a test"), threads=1), llama.manifest)
    try:
        for _ in range(2):  # the second of a shape has buffers
            index = np.array([rows[task] for task in TASKS])
            check_steps(folder, poet, lambda inputs: captured.run(bank, inputs, index), TASKS)  # noqa: B023
    finally:
        captured.close()


@pytest.mark.parametrize("ask", [over_rest, over_grpc])
def test_steps_on_the_server(folder: Path, poet: Adapter, llama: Bundle, tmp_path: Path, ask: Ask) -> None:
    own = serve(llama, tmp_path)
    try:
        check_steps(folder, poet, lambda inputs: ask(own, "llama", inputs, TASKS), TASKS)
        check_steps(folder, poet, lambda inputs: ask(own, "poet", inputs), ["poet"])
    finally:
        own.runtime.close()
        own.state.close()

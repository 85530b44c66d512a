"""Encoder-decoders: sequences of several tasks and sources join and leave, as `generate` of each merged PEFT model."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationMixin

from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.errors import InputError

NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 50,
    "init_std": 0.5,
}
SOUND = {"num_mel_bins": 6, "max_source_positions": 10, "max_target_positions": 200}
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "t5": ("T5ForConditionalGeneration", T5, ["q", "v", "wi", "wo"]),
    "bart": ("BartForConditionalGeneration", SIZES | {"max_position_embeddings": 200}, ["q_proj", "v_proj", "fc1"]),
    "whisper": ("WhisperForConditionalGeneration", SIZES | SOUND, ["q_proj", "v_proj", "fc2"]),
}
TASKS = ["a", "b", "c", "d"]
START = 3
TEXTS = [[5, 9, 31, 7, 12, 40, 3, 22, 8], [17, 2, 33], [1, 44, 6, 25, 38], [4]]
# Sequence -> its source and task, and the part of the tokens that it asks for: three run at a time.
SEQUENCES = [(0, 1.0), (1, 0.3), (2, 0.6), (3, 1.0), (1, 1.0), (2, 1.0), (0, 0.4), (3, 0.1)]


def made(name: str) -> Any:
    kind, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    own = {"n_positions": 200} if name == "t5" else {}
    model = model_class(model_class.config_class(**sizes, **NO_ENDS, **own, decoder_start_token_id=START)).eval()
    if name == "t5":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=START, pad_token_id=0)
    return model


def trained(name: str, place: Path) -> dict[str, Path]:
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=1 + seed, lora_alpha=4, target_modules=MODELS[name][2], init_lora_weights=False)
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
            get_peft_model(made(name), config).save_pretrained(str(place / task))
    return {task: place / task for task in TASKS}


def sources(name: str) -> list[dict[str, Any]]:
    if name != "whisper":
        return [{"input_ids": np.array(text)} for text in TEXTS]
    random = np.random.default_rng(0)
    return [{"input_features": random.standard_normal((6, 20), np.float32)} for _ in TASKS]


def merged(name: str, adapter: Path, inputs: dict[str, Any], count: int) -> list[int]:
    """New tokens of `generate` of a merged model."""
    model = PeftModel.from_pretrained(made(name), str(adapter)).merge_and_unload()
    given = {key: torch.from_numpy(value)[None] for key, value in inputs.items()}
    found = GenerationMixin.generate(
        model, **given, decoder_input_ids=torch.tensor([[START]]), do_sample=False, max_new_tokens=count
    )
    tokens: list[int] = found[0, 1:].tolist()
    return tokens


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 32) for name in MODELS), *(pytest.param(n, 128, marks=pytest.mark.soak) for n in MODELS)],
)
def test_rows_generate_what_their_merged_models_do(tmp_path: Path, name: str, count: int) -> None:
    paths, model, given = trained(name, tmp_path), made(name), sources(name)
    model.save_pretrained(tmp_path / "base")
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(tmp_path / "base", adapters, tmp_path / "bundle", generation=True)
    expected = [merged(name, paths[task], inputs, count) for task, inputs in zip(TASKS, given, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) == len(TASKS)
    assert all(len(tokens) == count and len(set(tokens)) > 2 for tokens in expected), expected
    with three_slots(bundle.path) as runtime:
        found = asyncio.run(streamed(runtime, given, count))
        for (row, part), tokens in zip(SEQUENCES, found, strict=True):
            assert tokens == expected[row][: max(1, int(part * count))]
        assert runtime.generate(inputs=given, tasks=TASKS, max_new_tokens=count) == expected
        begun = [[START, *tokens[:5]] for tokens in expected]
        rest = runtime.generate(begun, tasks=TASKS, inputs=given, max_new_tokens=count - 5)
        assert rest == [tokens[5:] for tokens in expected]
        usage = runtime.usage()
        assert (usage["slots"], usage["slots_taken"]) == (3, 0)
        refusals(runtime, given, expected)


def refusals(runtime: Runtime, given: list[dict[str, Any]], expected: list[list[int]]) -> None:
    """One sequence is refused in one line, while its neighbour goes on."""
    [(name, value)] = given[1].items()
    for wrong, message in [
        (None, "expected inputs of component 'encoder'"),
        ({name: value, "pixels": value}, "unknown 'pixels'"),
        ({name: value[None]}, "expected shape"),
    ]:

        async def both(wrong: dict[str, Any] | None = wrong) -> list[Any]:
            one = streamed_tokens(runtime, "a", given[0], 20)
            return await asyncio.gather(one, streamed_tokens(runtime, "b", wrong, 20), return_exceptions=True)

        tokens, error = asyncio.run(both())
        assert tokens == expected[0][:20]
        assert isinstance(error, InputError)
        assert message in str(error)
        assert "\n" not in str(error)


def three_slots(path: Path) -> Runtime:
    with Runtime(path, provider="cpu", preload=False) as runtime:
        plan = runtime._generation._plan
        assert plan is not None
    return Runtime(path, provider="cpu", threads=1, kv_bytes=3 * plan.nbytes // plan.slots)


async def streamed_tokens(runtime: Runtime, task: str, inputs: dict[str, Any] | None, length: int) -> list[int]:
    return [token.id async for token in runtime.stream(task=task, inputs=inputs, max_new_tokens=length)]


async def streamed(runtime: Runtime, given: list[dict[str, Any]], count: int) -> list[list[int]]:
    return await asyncio.gather(
        *(streamed_tokens(runtime, TASKS[row], given[row], max(1, int(part * count))) for row, part in SEQUENCES)
    )

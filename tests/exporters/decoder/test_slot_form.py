"""Causal language models in slot form: rows of several tasks decoded together, against `generate` of merged models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model

from tests.helpers.exporters.decoding import bundle_loop, folded_loop
from tpeft_deploy import export_bundle, load_adapter
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.cli import main
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.bases.slot_attention import IMPLEMENTATION
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.verify import verify_bundle

COUNT = 24
PROMPTS = [[5, 9, 31, 7, 12, 40, 3, 22, 8], [17, 2, 33], [1, 44, 6, 25, 38]]
TASKS = ["a", "base", "b"]
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **NO_ENDS,
}
ONE = {"num_hidden_layers": 1}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 6,
    "final_logit_softcapping": 4.0,
    "layer_types": ["sliding_attention", "full_attention"],
}
Made = tuple[str, dict[str, Any], list[str]]
MODELS: dict[str, Made] = {
    "llama": ("LlamaForCausalLM", SIZES | ONE, ["q_proj", "v_proj", "down_proj", "lm_head"]),
    "qwen3": ("Qwen3ForCausalLM", SIZES | ONE | {"head_dim": 16}, ["k_proj", "o_proj"]),
    "gemma3": ("Gemma3ForCausalLM", SIZES | GEMMA3, ["q_proj", "v_proj"]),
    "gpt2": ("GPT2LMHeadModel", GPT2 | NO_ENDS, ["c_attn", "c_fc"]),
    "mixtral": (
        "MixtralForCausalLM",
        SIZES | ONE | {"num_local_experts": 4, "sliding_window": None},
        ["q_proj", "v_proj"],
    ),
    "phi": ("PhiForCausalLM", SIZES | ONE | {"partial_rotary_factor": 0.5}, ["q_proj", "dense"]),
}


def made(name: str) -> Any:
    kind, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")
    return model


def trained(name: str, place: Path) -> dict[str, Path]:
    """Two PEFT directories."""
    _, _, targets = MODELS[name]
    for seed, task in enumerate(("a", "b")):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
        config = LoraConfig(r=2 + seed, lora_alpha=8, target_modules=targets, **options)
        get_peft_model(made(name), config).save_pretrained(str(place / task), save_embedding_layers=False)
    return {task: place / task for task in ("a", "b")}


def generated(name: str, adapter: Path | None, prompt: list[int]) -> tuple[list[int], np.ndarray[Any, Any]]:
    model = made(name)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": COUNT, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    logits = torch.cat(found.logits)
    return found.sequences[0, len(prompt) :].tolist(), logits.numpy()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_three_tasks_generate_what_their_merged_models_do(tmp_path: Path, name: str) -> None:
    paths = trained(name, tmp_path)
    model = made(name)
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(model, adapters, tmp_path / "bundle", generation=True)
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    assert type(model) is type(made(name))
    assert model.config._attn_implementation == "sdpa"
    assert {record["oracle"].split()[0] for record in bundle.manifest.oracles.values()} == {"peft"}
    tokens, logits = bundle_loop(bundle, TASKS, 40).greedy(PROMPTS, COUNT)
    for row, (task, prompt) in enumerate(zip(TASKS, PROMPTS, strict=True)):
        expected, own = generated(name, paths.get(task), prompt)
        assert tokens[row].tolist() == expected
        assert compare.relative_error(logits[row], own) <= 1e-5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_directory_exports_from_the_command_line_and_verifies(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path / "llama")
    paths = trained("llama", tmp_path)
    args = ["export", "bundle", str(tmp_path / "llama"), "--generation", "--out", str(tmp_path / "bundle"), "--folded"]
    result = CliRunner().invoke(main, [*args, "--adapter", f"a={paths['a']}"])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.decoder == DecoderPorts(
        tokens="input_ids",
        lengths="seqlens",
        logits="logits",
        caches=tuple((f"past_key_values.0.{part}", f"present.0.{part}") for part in ("key", "value")),
        positions=64,
        vocabulary=50,
    )
    runs = {(check["sizes"]["rows"], check["sizes"]["chunk"]) for check in bundle.manifest.gate}
    assert {(2, 3), (5, 1), (1, 4)} <= runs
    for base in (None, str(tmp_path / "llama")):
        assert {check.form for check in verify_bundle(bundle.path, base=base).checks} >= {"folded", "mixed rows"}
    tokens, _ = folded_loop(bundle, "a", 40).greedy(PROMPTS[:1], COUNT)
    assert tokens[0].tolist() == generated("llama", paths["a"], PROMPTS[0])[0]


def odd_heads() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"head_dim": 12}))


def position_biases() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))


def state_space() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (odd_heads, "no multiple of 8"),
        (position_biases, "expected a causal language model"),
        (state_space, "expected a causal language model"),
        (lambda: torch.nn.Linear(2, 2), "expected a causal language model"),
        (dict, "expected a torch.nn.Module"),
    ],
)
def test_a_base_that_has_no_slot_form_is_refused_in_one_line(model: Callable[[], Any], told: str) -> None:
    with pytest.raises(UnsupportedBase, match=told) as error:
        load_base(model(), generation=True)
    assert "\n" not in str(error.value)


def test_a_decoder_has_inputs_of_its_own() -> None:
    with pytest.raises(UnsupportedBase, match="Leave them out"):
        load_base(made("llama"), generation=True, rename={"logits": "scores"})


def test_attention_that_differs_from_the_model_is_refused() -> None:
    model = made("llama")
    for layer in model.model.layers:
        layer.self_attn.forward = partial(_scaled, layer.self_attn, layer.self_attn.forward)
    with pytest.raises(UnsupportedBase, match="relative error"):
        load_base(model, generation=True)


def _scaled(module: Any, forward: Callable[..., Any], *args: Any, **further: Any) -> Any:
    """The scale of another model where attention is not the model's."""
    module.scaling = 0.5 if module.config._attn_implementation == IMPLEMENTATION else 8**-0.5
    return forward(*args, **further)

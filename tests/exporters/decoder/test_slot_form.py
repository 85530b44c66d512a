"""Causal language models in slot form: rows of several tasks decoded together, against `generate` of merged models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from tests.helpers.exporters.decoding import bundle_loop, folded_loop
from tests.helpers.exporters.small_decoders import ONE, SIZES, generated, made, trained
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
        choice="choice.onnx",
    )
    runs = {(check["sizes"]["rows"], check["sizes"]["chunk"]) for check in bundle.manifest.gate}
    assert {(2, 3), (5, 1), (1, 4)} <= runs
    for base in (None, str(tmp_path / "llama")):
        assert {check.form for check in verify_bundle(bundle.path, base=base).checks} >= {"folded", "mixed rows"}
    tasks = ["a", "base"]
    tokens, logits = bundle_loop(bundle, tasks, 40).greedy(PROMPTS[:2], COUNT)
    for row, (task, prompt) in enumerate(zip(tasks, PROMPTS[:2], strict=True)):
        expected, own = generated("llama", paths["a"] if task == "a" else None, prompt, COUNT)
        assert tokens[row].tolist() == expected
        assert compare.relative_error(logits[row], own) <= 1e-5
    tokens, _ = folded_loop(bundle, "a", 40).greedy(PROMPTS[:1], COUNT)
    assert tokens[0].tolist() == generated("llama", paths["a"], PROMPTS[0], COUNT)[0]


def position_biases() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))


def state_space() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("model", "told"),
    [
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


def test_heads_of_odd_sizes_attend_in_plain_operators() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | ONE | {"head_dim": 12}))
    base = load_base(model, generation=True)  # compares the slot form with the model
    operators = {node.op_type for node in base.graph().graph}
    assert "ScatterElements" in operators
    assert "GroupQueryAttention" not in operators


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

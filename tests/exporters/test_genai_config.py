from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from tpeft_deploy import Bundle, export_bundle, load_adapter
from tpeft_deploy.exporters.genai_config import GENAI_CONFIG

SIZES: Any = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
PROMPT = [5, 9, 31, 7]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_causal_model_with_growing_caches_has_settings_that_onnxruntime_genai_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    made.save_pretrained(tmp_path / "base")

    def base() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")

    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(base(), config).save_pretrained(str(tmp_path / "a"))
    adapters = {"a": load_adapter(tmp_path / "a", base=made)}
    bundle = export_bundle(tmp_path / "base", adapters, tmp_path / "bundle")
    written = json.loads((bundle.path / GENAI_CONFIG).read_text())
    assert bundle.manifest.files[GENAI_CONFIG].bytes > 0
    own = written["model"]
    assert (own["vocab_size"], own["context_length"], own["eos_token_id"]) == (50, 64, 0)
    assert (own["decoder"]["num_hidden_layers"], own["decoder"]["head_size"]) == (2, 8)
    merged = PeftModel.from_pretrained(base(), str(tmp_path / "a")).merge_and_unload()
    check_run(bundle, {"base": made, "a": merged})


def check_run(bundle: Bundle, expected: dict[str, Any]) -> None:
    """The package writes what `generate` does; it needs onnxruntime, of which one on a GPU has the other kind."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is in no extra: install it to run this")
    model = genai.Model(str(bundle.path))
    adapters = genai.Adapters(model)
    adapters.load(str(bundle.path / "adapters" / "a" / bundle.digest("a") / "adapter.onnx_adapter"), "a")
    for task, module in expected.items():
        wanted = module.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=20)[0].tolist()
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT) + 20)
        generator = genai.Generator(model, parameters)
        if task != "base":
            generator.set_active_adapter(adapters, task)
        generator.append_tokens(PROMPT)
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(token) for token in generator.get_sequence(0)] == wanted


def test_others_have_none(conv_bundle: Bundle) -> None:
    assert not (conv_bundle.path / GENAI_CONFIG).exists()

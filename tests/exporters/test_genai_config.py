from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

import pytest

from tests.helpers.exporters.small_decoders import generated, made, trained
from tpeft_deploy import Bundle, export_bundle, load_adapter
from tpeft_deploy.exporters.genai_config import GENAI_CONFIG

PROMPT = [5, 9, 31, 7]
COUNT = 20
END = 49


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("name", ["llama"])
def test_a_causal_model_with_growing_caches_has_settings_that_onnxruntime_genai_runs(tmp_path: Path, name: str) -> None:
    model, paths = made(name), trained(name, tmp_path)
    model.config.eos_token_id = END
    model.save_pretrained(tmp_path / "base")
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(tmp_path / "base", adapters, tmp_path / "bundle")
    own = json.loads((bundle.path / GENAI_CONFIG).read_text())["model"]
    assert bundle.manifest.files[GENAI_CONFIG].bytes > 0
    assert (own["vocab_size"], own["context_length"], own["pad_token_id"]) == (50, 64, 0)
    assert own["eos_token_id"] == END
    assert (own["decoder"]["num_hidden_layers"], own["decoder"]["head_size"]) == (1, 8)
    check_runs(bundle, name, paths)


def check_runs(bundle: Bundle, name: str, paths: dict[str, Path]) -> None:
    """The package gives the tokens of `generate`.  It needs onnxruntime, and on a GPU the other one is installed."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is in no extra: install it to run this")
    model = genai.Model(str(bundle.path))
    adapters = genai.Adapters(model)
    for task in paths:
        adapters.load(str(bundle.path / "adapters" / task / bundle.digest(task) / "adapter.onnx_adapter"), task)
    for task in ("base", *paths):
        wanted, _ = generated(name, paths.get(task), PROMPT, COUNT)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT) + COUNT)
        generator = genai.Generator(model, parameters)
        if task != "base":
            generator.set_active_adapter(adapters, task)
        generator.append_tokens(PROMPT)
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(token) for token in generator.get_sequence(0)] == [
            *PROMPT,
            *takewhile(lambda token: token != END, wanted),
        ]


def test_others_have_none(conv_bundle: Bundle) -> None:
    assert not (conv_bundle.path / GENAI_CONFIG).exists()

"""Adapters trained after `resize_token_embeddings`: PEFT on the resized model is the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model

from tpeft_deploy import Runtime, load_adapter
from tpeft_deploy.bundle.manifest import Varies
from tpeft_deploy.cli import main
from tpeft_deploy.errors import ShapeError, UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.resizing import check_vocabulary, fit_vocabulary

OLD, NEW = 30, 33
IDS = np.array([[1, 31, 9, 32], [7, 3, 30, 8]])
# A cache of one token, which the mask hides.
INPUTS = {f"past_key_values.0.{what}": np.zeros((2, 2, 1, 8), np.float32) for what in ("key", "value")}
INPUTS |= {"input_ids": IDS, "attention_mask": np.array([[0, 1, 1, 1, 1]] * 2)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's of renamed functions
        yield


def llama(*, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": OLD, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=tied, max_position_embeddings=32, **sizes)
    return LlamaForCausalLM(config).eval()


def grown(rows: int = NEW) -> Any:
    model = llama()
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows)
    return model


def train(path: Path, rows: int = NEW, **options: Any) -> Path:
    """An adapter of a model with more tokens; `path` holds what was saved of it."""
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    model = get_peft_model(grown(rows), LoraConfig(r=2, init_lora_weights=False, **options))
    for wrapper in (model.get_input_embeddings(), model.get_output_embeddings()):
        for module in getattr(wrapper, "modules_to_save", {}).values():
            torch.nn.init.normal_(module.weight)
    model.save_pretrained(path, save_embedding_layers=not options.get("modules_to_save"))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama().save_pretrained(place / "base")
        train(place / "saved")
        train(place / "whole", modules_to_save=["embed_tokens", "lm_head"])
        train(place / "larger", rows=NEW + 1)
        train(place / "targeted", target_modules=["q_proj", "embed_tokens"])
    return place


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_a_bundle_serves_what_peft_computes(place: Path, tmp_path: Path) -> None:
    tasks = [part for task in ("saved", "whole") for part in ("--adapter", f"{task}={place / task}")]
    export = ["export", "bundle", str(place / "base"), *tasks, "--out", str(tmp_path / "bundle")]
    done = CliRunner().invoke(main, [*export, "--resize-embeddings"])
    assert done.exit_code == 0, done.stderr
    with Runtime(tmp_path / "bundle", provider="cpu") as runtime:
        for task in ("saved", "whole"):
            expected = logits(PeftModel.from_pretrained(grown(), place / task).eval())
            np.testing.assert_allclose(runtime.run(INPUTS, task=task)["logits"], expected, rtol=1e-4, atol=1e-5)
        got = runtime.run(INPUTS | {"input_ids": IDS % OLD}, task="base")["logits"]
        np.testing.assert_allclose(got[..., :OLD], logits(llama(), IDS % OLD), rtol=1e-4, atol=1e-5)
        assert not got[..., OLD:].any()


def test_without_the_option_the_error_names_it(place: Path) -> None:
    base = load_base(str(place / "base"))
    adapters = {"a": load_adapter(place / "saved")}
    message = r"expected the 30 tokens of the base, got 33, as after resize_token_embeddings\(33\).*--resize-embeddings"
    with pytest.raises(UnsupportedTarget, match=message):
        check_vocabulary(base, adapters, {})
    check_vocabulary(base, adapters, {"logits": Varies(2, "lm_head.weight")})
    check_vocabulary(fit_vocabulary(base, adapters), adapters, {})


@pytest.mark.parametrize("more", [["--dry-run"], ["--out", "folded.onnx"]])
def test_folded_exports_take_the_option(place: Path, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Base] = []

    def trace(base: Base, *_: object) -> None:
        traced.append(base)
        raise UnsupportedBase("trace", problem="not here")

    monkeypatch.setattr("tpeft_deploy.exporters.folded._trace", trace)
    export = ["export", "folded", str(place / "base"), str(place / "whole"), *more]
    for option in ([], ["--resize-embeddings"]):
        assert "not here" in CliRunner().invoke(main, [*export, *option]).stderr
    assert [len(base.weights["lm_head.weight"]) for base in traced] == [OLD, NEW]


def test_the_users_model_stays_as_it_is() -> None:
    from tpeft_deploy.exporters.bases.torch_module import TorchBase

    module = llama(tied=True)
    ids = {"input_ids": torch.from_numpy(IDS % OLD)}
    base = load_base(module, example_inputs=ids)
    before = module(**ids).logits
    resized = base.resized(NEW)
    assert isinstance(resized, TorchBase)
    assert [set(names) for names in resized.ties] == [{"lm_head.weight", "model.embed_tokens.weight"}]
    assert resized.weights["lm_head.weight"].shape == (NEW, 16)
    assert torch.equal(module(**ids).logits, before)
    assert module.config.vocab_size == OLD
    own, other = (dict(each.named_parameters()) for each in (module, resized.module))
    shared = [name for name in own if own[name] is other[name]]
    assert set(own) - set(shared) == {"model.embed_tokens.weight"}


def test_what_cannot_be_resized_is_named(place: Path) -> None:
    base = load_base(str(place / "base"))
    adapters = {task: load_adapter(place / task) for task in ("saved", "larger")}
    with pytest.raises(UnsupportedTarget, match=r"got 33 of .* in task 'saved' and 34 of .* in task 'larger'"):
        fit_vocabulary(base, adapters)
    with pytest.raises(UnsupportedBase, match="has resize_token_embeddings, got Linear"):
        load_base(torch.nn.Linear(3, 4), example_inputs={"input": torch.ones(2, 3)}).resized(5)
    assert fit_vocabulary(base, {}) is base
    with pytest.raises(ShapeError, match=r"resize_token_embeddings\(33\)"):
        load_adapter(place / "targeted", base=place / "base")

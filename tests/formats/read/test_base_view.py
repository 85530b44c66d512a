"""What a base is to readers of adapters; a bundle says what its weights are without reading them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle, load_adapter
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.cli import main
from tpeft_deploy.errors import BaseMismatch, FormatError, ShapeError, UnsupportedBase
from tpeft_deploy.formats.read.base_view import view


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes))


def tiny_whisper() -> Any:
    """Not a base that an export takes whole, but one with names."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60}
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(
        WhisperConfig(num_mel_bins=6, max_source_positions=8, **sizes, **heads, **tokens)
    )


def test_shapes_and_digests_are_those_of_the_weights(conv_bundle: Bundle) -> None:
    view = conv_bundle.base_view
    for name in view.weights:
        assert view.shape(name) == view.weights[name].shape
        assert view.digest(name) == weight_digest(view.weights[name])


def test_an_adapter_is_checked_against_a_bundle_without_its_weights(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Bundle, "base_value", no_reading)
    own = conv_adapters["plain"]
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(own.to_bytes())
    assert load_adapter(file, base=conv_bundle.base_view).deltas.keys() == own.deltas.keys()
    name = next(iter(own.deltas))
    file.write_bytes(Adapter(own.deltas, base_digests={name: "0" * 64}).to_bytes())
    with pytest.raises(BaseMismatch, match=name):
        load_adapter(file, base=conv_bundle.base_view)
    other = next(delta for key, delta in own.deltas.items() if delta.shape != own.deltas[name].shape)
    file.write_bytes(Adapter({name: other}).to_bytes())
    with pytest.raises(ShapeError, match=name):
        load_adapter(file, base=conv_bundle.base_view)


class TestBasesByName:
    """`load_adapter` takes what an export takes: a name for the model and the model are one base."""

    @pytest.fixture
    def adapter(self, conv_adapters: dict[str, Adapter], tmp_path: Path) -> Path:
        file = tmp_path / "adapter.safetensors"
        file.write_bytes(conv_adapters["two"].to_bytes())
        return file

    def test_a_factory_and_a_bundle(self, conv_bundle: Bundle, adapter: Path) -> None:
        for base in ("tests.helpers.nets:conv_net", conv_bundle, nets.conv_net()[0]):
            found = view(base)
            assert {*nets.conv_net()[0].state_dict()} - {*found.weights} <= {"norm.num_batches_tracked"}
            assert load_adapter(adapter, base=base).deltas.keys() == load_adapter(adapter).deltas.keys()

    @pytest.mark.parametrize("make", [tiny_llama, tiny_whisper])
    def test_a_model_directory(self, make: Callable[[], Any], tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(tmp_path / "base")
        by_path, by_module = view(tmp_path / "base"), view(model)
        saved = load_file(tmp_path / "base" / "model.safetensors")
        assert set(by_module.weights) > set(saved)  # save_pretrained leaves out one of two tied names
        assert set(by_path.weights) == set(by_module.weights)
        assert by_path.kinds == by_module.kinds
        for name, array in by_module.weights.items():
            np.testing.assert_array_equal(by_path.weights[name], array)

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("nowhere", "expected package.module:factory, an .onnx file, or a Hugging Face model directory"),
            ("tests.helpers.nets:nothing", "expected a callable 'nothing'"),
            ("nowhere.onnx", "expected an .onnx file, got no such file"),
            ("tests", "expected a Hugging Face model directory"),
            (3, "an open bundle, a torch module or the path"),
        ],
    )
    def test_what_is_no_base_is_named(self, base: object, message: str, adapter: Path) -> None:
        with pytest.raises((FormatError, UnsupportedBase), match=re.escape(message)):
            load_adapter(adapter, base=base)

    def test_the_command_line_takes_them_too(self, conv_bundle: Bundle, adapter: Path, tmp_path: Path) -> None:
        for base in ("tests.helpers.nets:conv_net", str(conv_bundle.path)):
            shown = CliRunner().invoke(main, ["inspect", str(adapter), "--base", base, "--json"])
            assert all(entry["share"] for entry in json.loads(shown.stdout)["weights"] if entry["change"] == "delta")
        arguments = ["convert", str(adapter), str(tmp_path / "out"), "--to", "tpeft", "--base", str(conv_bundle.path)]
        assert CliRunner().invoke(main, arguments).exit_code == 0

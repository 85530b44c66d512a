from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.helpers.formats.pefts import (
    adapted,
    change_config,
    config_of,
    distance,
    error_of,
    peft_model,
    refusal,
    run,
    save,
    text,
    vision,
)
from tpeft_deploy.formats import load_adapter

LIMITS = [pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.float64, 1e-9, id="float64")]
LAYERS = ["stem", "point", "line", "volume", "fc", "square"]


def lora(*modules: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=list(modules), **options)


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
class TestAgainstPeft:
    @pytest.mark.parametrize("layer", LAYERS)
    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
    def test_a_layer(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, layer: str, options: dict[str, Any]
    ) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, lora(layer, **options), tmp_path)
        assert error < limit
        assert set(adapter.deltas) == {f"{layer}.weight"}
        assert set(adapter.gains) == ({f"{layer}.weight"} if "use_dora" in options else set())

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
    @pytest.mark.parametrize("layer", ["embed", "same", "wide"])
    def test_embeddings_and_transposed_layers(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, layer: str, options: dict[str, Any]
    ) -> None:
        base, ids = text(dtype)
        error, adapter = error_of(base, ids, lora(layer, **options), tmp_path)
        assert error < limit
        assert adapter.deltas[f"{layer}.weight"].shape == tuple(base.get_parameter(f"{layer}.weight").shape)
        if "use_dora" in options:
            assert adapter.gains[f"{layer}.weight"].shape[0] == 1

    def test_patterns_choose_rank_and_alpha_by_the_end_of_a_name(
        self, tmp_path: Path, dtype: torch.dtype, limit: float
    ) -> None:
        base, x = vision(dtype)
        config = lora(*LAYERS, rank_pattern={"^fc": 3, "stem": 2}, alpha_pattern={"f.": 1, "square": 9, "are": 100})
        error, adapter = error_of(base, x, config, tmp_path)
        assert error < limit
        scales = {name: delta.scale for name, delta in adapter.deltas.items()}
        assert scales["fc.weight"] == pytest.approx(1 / 3)
        assert scales["square.weight"] == pytest.approx(9 / 4)
        assert scales["stem.weight"] == pytest.approx(3)

    def test_biases_are_added_to(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, lora("stem", "line", "fc", lora_bias=True), tmp_path)
        assert error < limit
        assert set(adapter.overrides) == {"stem.bias", "line.bias", "fc.bias"}

    def test_heads_norms_and_biases_beside(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        config = lora("stem", "fc", bias="lora_only", modules_to_save=["head", "norm"])

        def shift(model: Any) -> None:
            for name, buffer in model.named_buffers():
                if "modules_to_save" in name and buffer.is_floating_point():
                    buffer.add_(0.3)

        error, adapter = error_of(base, x, config, tmp_path, change=shift)
        assert error < limit
        assert {"head.weight", "head.bias", "stem.bias", "fc.bias", "norm.running_mean"} <= set(adapter.overrides)

    def test_all_biases(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, lora("fc", bias="all"), tmp_path)
        assert error < limit
        assert "stem.bias" in adapter.overrides


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_of_half_precision(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base, x = vision()
        model = peft_model(base, lora("stem", "fc")).to(dtype)
        save(model, tmp_path)
        base.load_state_dict(model.float().unload().state_dict())  # rounded as well
        model = peft_model(base, lora("stem", "fc")).to(dtype).float()
        assert distance(run(adapted(base, load_adapter(tmp_path, base=base)), x), run(model, x)) < 2e-5

    def test_without_a_base(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, lora(*LAYERS)), tmp_path)
        with_base, without = load_adapter(tmp_path, base=base), load_adapter(tmp_path)
        assert with_base.deltas.keys() == without.deltas.keys()
        for name, delta in with_base.deltas.items():
            np.testing.assert_array_equal(delta.dense(), without.deltas[name].dense())

    def test_of_a_classifier_of_transformers(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
        base = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size)).eval()
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "dense", "word_embeddings"])
        model = peft_model(base, config)
        ids = torch.randint(0, 50, (2, 6))
        adapter = load_adapter(save(model, tmp_path), base=base)
        assert {"classifier.weight", "classifier.bias"} == set(adapter.overrides)
        with torch.no_grad():
            expected, got = model(ids).logits, adapted(base, adapter)(ids).logits
        assert distance(got, expected) < 2e-5

    def test_with_a_copy_of_the_embedding(self, tmp_path: Path) -> None:
        # PEFT saves the base of an embedding that is called embed_tokens, on its own account.
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=False, **size)).eval()
        model = peft_model(base, lora("q_proj", "embed_tokens"))
        adapter = load_adapter(save(model, tmp_path), base=base)
        assert set(adapter.base_digests) == {"model.embed_tokens.weight"}
        assert not adapter.overrides
        ids = torch.randint(0, 50, (2, 6))
        with torch.no_grad():
            expected, got = model(ids).logits, adapted(base, adapter)(ids).logits
        assert distance(got, expected) < 2e-5

    def test_of_a_gpt2(self, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()
        model = peft_model(base, lora("c_attn", "c_proj", use_dora=True))
        adapter = load_adapter(save(model, tmp_path), base=base)
        assert len(adapter.deltas) == 6
        ids = torch.randint(0, 50, (2, 6))
        with torch.no_grad():
            expected, got = model(ids).logits, adapted(base, adapter)(ids).logits
        assert distance(got, expected) < 2e-5


class TestFaultsOfPeft:
    """What PEFT 0.21.2 does that its own formulas do not say; each was trained with and is read as it is."""

    def test_fan_in_fan_out_is_overwritten_by_the_last_layer(self, tmp_path: Path) -> None:
        base, ids = text(torch.float64)
        error, _ = error_of(base, ids, lora("same", "wide", "query"), tmp_path)
        assert config_of(tmp_path)["fan_in_fan_out"] is False  # although two of three layers need it
        assert error < 1e-9

    def test_without_a_base_the_configuration_says_what_is_transposed(self, tmp_path: Path) -> None:
        base, _ = text()
        save(peft_model(base, lora("same", "wide")), tmp_path)
        with_base, without = load_adapter(tmp_path, base=base), load_adapter(tmp_path)
        for name, delta in with_base.deltas.items():
            np.testing.assert_array_equal(delta.dense(), without.deltas[name].dense())

    def test_padding_mode_is_left_out_of_the_unmerged_branch_and_not_of_the_merge(self, tmp_path: Path) -> None:
        # huggingface/peft#3697, #3700.  A change of the weight has the layer's own padding, as the merge has it.
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")).double().eval()
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        model = peft_model(base, lora("0"))
        adapter = load_adapter(save(model, tmp_path), base=base)
        got = run(adapted(base, adapter), x)
        assert distance(got, run(model, x)) > 1e-2
        assert distance(got, run(copy.deepcopy(model).merge_and_unload(), x)) < 1e-9

    def test_dilation_crashes_the_unmerged_branch_and_not_the_merge(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 5, 3, dilation=2)).double().eval()
        x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
        model = peft_model(base, lora("0"))
        adapter = load_adapter(save(model, tmp_path), base=base)
        with pytest.raises(RuntimeError):
            run(model, x)
        assert distance(run(adapted(base, adapter), x), run(model.merge_and_unload(), x)) < 1e-9

    @pytest.mark.parametrize("layer", ["grouped", "depthwise"])
    def test_the_change_of_a_grouped_convolution_is_not_grouped(self, tmp_path: Path, layer: str) -> None:
        # huggingface/peft#2403, #2549, #2567.
        base, _ = vision()
        rank = 3 if layer == "grouped" else 24
        save(peft_model(base, LoraConfig(r=rank, target_modules=[layer])), tmp_path)
        for known in (base, None):
            message = refusal(tmp_path, known)
            assert "each group of outputs then sees all inputs" in message
            assert layer in message


class TestMovedBases:
    """PiSSA and OLoRA subtract a part of the base weight when they are injected."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("dora", [False, True])
    def test_the_part_is_computed_from_the_base(self, tmp_path: Path, init: str, dora: bool) -> None:
        base, x = vision()
        config = lora("fc", "square", init_lora_weights=init, use_dora=dora)
        error, adapter = error_of(base, x, config, tmp_path)
        assert error < 2e-5
        assert {delta.ranks for delta in adapter.deltas.values()} <= {(8, 8), (16, 12), (16, 16)}
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert distance(run(adapted(base, adapter), x), run(loaded, x)) < 2e-5

    def test_a_transposed_layer(self, tmp_path: Path) -> None:
        base, ids = text()
        assert error_of(base, ids, lora("same", "wide", init_lora_weights="pissa"), tmp_path)[0] < 2e-5

    def test_needs_the_base(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, lora("fc", init_lora_weights="pissa")), tmp_path)
        assert "Give base=" in refusal(tmp_path)

    def test_converted_when_saved(self, tmp_path: Path) -> None:
        base, x = vision()
        config = lora("fc", init_lora_weights="pissa")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
            model.save_pretrained(tmp_path / "initial")
            change_config(tmp_path / "initial", init_lora_weights=True)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(
                tmp_path / "saved", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
            )
        assert config_of(tmp_path / "saved")["init_lora_weights"] is True
        adapter = load_adapter(tmp_path / "saved", base=base)
        assert distance(run(adapted(base, adapter), x), run(model, x)) < 2e-5


class TestRefusals:
    def test_dora_and_lora_bias_need_the_base(self, tmp_path: Path) -> None:
        base, _ = vision()
        for number, options in enumerate(({"use_dora": True}, {"lora_bias": True})):
            path = save(peft_model(base, lora("fc", **options)), tmp_path / str(number))
            assert "Give base=" in refusal(path)

    def test_a_bias_where_the_base_has_none(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, lora("square", lora_bias=True)), tmp_path)
        assert "expected a bias of shape (16,) in the base" in refusal(tmp_path, base)

    def test_biases_changed_in_two_ways(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, lora("fc", lora_bias=True, bias="lora_only")), tmp_path)
        assert "bias='lora_only'" in refusal(tmp_path, base)

    @pytest.mark.parametrize("alpha", [None, float("nan"), "6", True])
    def test_no_alpha(self, tmp_path: Path, alpha: Any) -> None:
        base, _ = vision()
        change_config(save(peft_model(base, lora("fc")), tmp_path), lora_alpha=alpha)
        assert "a finite number as lora_alpha" in refusal(tmp_path, base)

    def test_a_configuration_of_another_adapter(self, tmp_path: Path) -> None:
        base, _ = vision()
        change_config(save(peft_model(base, lora("fc")), tmp_path), r=8)
        assert "expected tensors of rank 8, as in adapter_config.json, got rank 4" in refusal(tmp_path, base)

    def test_a_pattern_that_is_none(self, tmp_path: Path) -> None:
        base, _ = vision()
        change_config(save(peft_model(base, lora("fc")), tmp_path), alpha_pattern={"(": 3})
        assert "regular expressions" in refusal(tmp_path, base)

    def test_a_scale_beside_the_configuration(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, lora("fc")), tmp_path)
        assert "Leave scale out" in refusal(tmp_path, base, scale=2.0)

    def test_another_base(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, lora("fc", use_dora=True)), tmp_path)
        other = copy.deepcopy(base)
        other.fc = nn.Linear(12, 20)
        assert "was trained on this base" in refusal(tmp_path, other)

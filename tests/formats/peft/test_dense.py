"""PEFT's methods whose change is no plain pair of factors, against PEFT's forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AdamssConfig,
    BeftConfig,
    C3AConfig,
    FourierFTConfig,
    GraloraConfig,
    LNTuningConfig,
    LoraConfig,
    RandLoraConfig,
    ShiraConfig,
    SupertuningConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    WaveFTConfig,
)
from safetensors.numpy import load_file, save_file
from torch import nn

from tests.helpers.formats.pefts import change_config, distance, error_of, peft_model, refusal, save, text, vision
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.read.torch_random import first_of_permutation

Config = Callable[[], Any]
VISION: dict[str, tuple[str, Config]] = {
    "randlora": (
        "fc square head",
        lambda: RandLoraConfig(r=3, randlora_alpha=6, target_modules=["fc", "square", "head"]),
    ),
    "randlora sparse": ("fc", lambda: RandLoraConfig(r=5, randlora_alpha=6, sparse=True, target_modules=["fc"])),
    "c3a": ("fc square", lambda: C3AConfig(block_size=4, target_modules=["fc", "square"])),
    "c3a of several sizes": (
        "fc square",
        lambda: C3AConfig(block_size=1, block_size_pattern={"square": 8}, target_modules=["fc", "square"]),
    ),
    "fourierft": ("fc square", lambda: FourierFTConfig(n_frequency=40, target_modules=["fc", "square"])),
    "fourierft of low rank": ("fc square", lambda: FourierFTConfig(n_frequency=2, target_modules=["fc", "square"])),
    "waveft": ("fc head", lambda: WaveFTConfig(n_frequency=50, random_loc_seed=3, target_modules=["fc", "head"])),
    "waveft without a transform": ("fc", lambda: WaveFTConfig(n_frequency=50, use_idwt=False, target_modules=["fc"])),
    "vblora": (
        "fc square",
        lambda: VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=3, target_modules=["fc", "square"]),
    ),
    "unilora": (
        "fc square",
        lambda: UniLoraConfig(r=2, theta_d_length=11, save_indices=True, target_modules=["fc", "square"]),
    ),
    "shira": ("fc square", lambda: ShiraConfig(r=2, random_seed=1, target_modules=["fc", "square"])),
    "supertuning": ("fc", lambda: SupertuningConfig(sparsity=0.7, target_modules=["fc"])),
    "supertuning with lora": ("fc", lambda: SupertuningConfig(sparsity=0.7, r=2, target_modules=["fc"])),
    "gralora": ("fc square", lambda: GraloraConfig(r=4, gralora_k=2, target_modules=["fc", "square"])),
    "gralora of low rank": (
        "fc square",
        lambda: GraloraConfig(r=2, gralora_k=2, hybrid_r=1, alpha=3, target_modules=["fc", "square"]),
    ),
}
TEXT: dict[str, tuple[str, Config]] = {
    "randlora": (
        "same wide query",
        lambda: RandLoraConfig(r=3, randlora_alpha=6, target_modules=["same", "wide", "query"]),
    ),
    "fourierft": ("same wide query", lambda: FourierFTConfig(n_frequency=40, target_modules=["same", "wide", "query"])),
    "fourierft of low rank": ("wide", lambda: FourierFTConfig(n_frequency=2, target_modules=["wide"])),
    "waveft": ("same wide query", lambda: WaveFTConfig(n_frequency=50, target_modules=["same", "wide", "query"])),
    "vblora": (
        "same wide query",
        lambda: VBLoRAConfig(
            r=2, num_vectors=9, vector_length=4, save_only_topk_weights=True, target_modules=["same", "wide", "query"]
        ),
    ),
    "unilora": (
        "same wide",
        lambda: UniLoraConfig(r=2, theta_d_length=11, save_indices=True, target_modules=["same", "wide"]),
    ),
    "gralora": (
        "same wide query",
        lambda: GraloraConfig(r=4, gralora_k=4, hybrid_r=1, alpha=3, target_modules=["same", "wide", "query"]),
    ),
}
SINGLE = ("c3a", "fourierft")  # PEFT transforms in float32, whatever the base is
CASES = [
    *((vision, name, *VISION[name]) for name in VISION),
    *((text, name, *TEXT[name]) for name in TEXT),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
class TestAgainstPeft:
    @pytest.mark.parametrize(
        ("make", "name", "layers", "config"), CASES, ids=[f"{make.__name__}-{name}" for make, name, *_ in CASES]
    )
    def test_a_change(
        self, tmp_path: Path, dtype: torch.dtype, make: Any, name: str, layers: str, config: Config
    ) -> None:
        base, x = make(dtype)
        error, adapter = error_of(base, x, config(), tmp_path, scale=2.0 if name.startswith("c3a") else 0.4)
        assert error < (1e-9 if dtype == torch.float64 and not name.startswith(SINGLE) else 2e-5)
        assert set(adapter.deltas) == {f"{layer}.weight" for layer in layers.split()}
        assert not adapter.overrides

    def test_norms(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base, x = vision(dtype)
        config = LNTuningConfig(target_modules=["norm", "head"])

        def train(model: Any) -> None:
            model.base_model.model.norm.ln_tuning_layers["default"].running_mean += 0.3

        error, adapter = error_of(base, x, config, tmp_path, change=train)
        assert error < (1e-12 if dtype == torch.float64 else 2e-6)
        assert {"norm.weight", "norm.bias", "norm.running_mean", "head.weight", "head.bias"} < set(adapter.overrides)

    def test_biases(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, BeftConfig(target_modules=["fc", "head"]), tmp_path)
        assert error < (1e-12 if dtype == torch.float64 else 2e-6)
        assert set(adapter.overrides) == {"fc.bias", "head.bias"}
        assert adapter.base_digests == {
            name: weight_digest(base.get_parameter(name).detach().numpy()) for name in adapter.overrides
        }

    @pytest.mark.parametrize(
        "config",
        [
            TrainableTokensConfig(token_indices=[7, 0, 3], target_modules=["embed"]),
            LoraConfig(r=2, target_modules=["query"], trainable_token_indices={"embed": [19, 4]}),
        ],
        ids=["alone", "beside lora"],
    )
    def test_tokens(self, tmp_path: Path, dtype: torch.dtype, config: Any) -> None:
        base, _ = text(dtype)
        error, adapter = error_of(base, torch.arange(20).reshape(4, 5), config, tmp_path)
        assert error < (1e-12 if dtype == torch.float64 else 2e-6)
        delta = adapter.deltas["embed.weight"]
        assert delta.ranks[0] == len(np.nonzero(delta.dense().any(axis=1))[0])
        assert set(adapter.base_digests) == {"embed.weight"}

    def test_rows_of_a_linear_layer(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """PEFT runs a layer with trained rows without its bias."""
        base, x = vision(dtype)
        config = TrainableTokensConfig(token_indices=[4, 1], target_modules=["head"])
        error, adapter = error_of(base, x, config, tmp_path)
        assert error < (1e-12 if dtype == torch.float64 else 2e-6)
        assert adapter.notes["head.bias"] == "PEFT runs this layer without its bias"


class TestTiedTokens:
    """PEFT changes the output layer that transformers ties to the input embedding, unless it was told otherwise."""

    @pytest.mark.parametrize(
        ("named", "targets"),
        [
            ([1, 3], None),
            ({"wte": [1, 3]}, None),
            ({"wte": [1, 3], "lm_head": [1, 3]}, None),
            ({"wte": [1, 3], "lm_head": [1, 4]}, None),
            ({"lm_head": [1, 3]}, None),
            (None, ["wte"]),
            (None, ["lm_head"]),
        ],
    )
    def test_each_use(self, tmp_path: Path, named: Any, targets: Any) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, int] = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 40}
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
        if named is None:
            config: Any = TrainableTokensConfig(token_indices=[1, 3], target_modules=targets)
        else:
            config = LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=named, fan_in_fan_out=True)
        model = peft_model(base, config)
        ids = torch.arange(40)[None]
        with torch.no_grad():
            expected = model(ids).logits
        save(model, tmp_path)
        adapter = load_adapter(tmp_path, base=base)
        untied = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)).eval()
        untied.load_state_dict(base.state_dict())
        with torch.no_grad():
            for name in adapter.deltas:
                weight = untied.get_parameter(name)
                weight.copy_(torch.from_numpy(adapter.merged(name, weight.numpy())))
            got = untied(ids).logits
        assert distance(got, expected) < 2e-6


class TestRefusals:
    """Files that do not say all, or that say what cannot be; none of them makes anything large."""

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("kind", "fields", "fix"),
        [
            (RandLoraConfig, {"r": 4, "save_projection": False}, "save_projection=True"),
            (UniLoraConfig, {"r": 2, "theta_d_length": 10}, "Set save_indices to true"),
            (SupertuningConfig, {"save_precomputed_indices": False}, "save_precomputed_indices=True"),
            (WaveFTConfig, {"n_frequency": 9, "wavelet_family": "db2"}, "does not support"),
            (BeftConfig, {}, "Give the layer a bias of zeros"),
        ],
    )
    def test_what_the_file_or_the_base_does_not_hold(self, tmp_path: Path, kind: Any, fields: Any, fix: str) -> None:
        base, _ = vision()
        save(peft_model(base, kind(target_modules=["square"], **fields)), tmp_path)
        assert fix in refusal(tmp_path, base)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        "config",
        [
            RandLoraConfig(r=4, target_modules=["fc"]),
            C3AConfig(block_size=4, target_modules=["fc"]),
            FourierFTConfig(n_frequency=9, target_modules=["fc"]),
            WaveFTConfig(n_frequency=9, target_modules=["fc"]),
            ShiraConfig(r=1, target_modules=["fc"]),
            SupertuningConfig(target_modules=["fc"]),
            BeftConfig(target_modules=["fc"]),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_no_base_and_another(self, tmp_path: Path, config: Any) -> None:
        base, _ = vision()
        save(peft_model(base, config, scale=2.0), tmp_path)
        assert "Give base=" in refusal(tmp_path)
        if not isinstance(config, FourierFTConfig | WaveFTConfig | ShiraConfig | SupertuningConfig):
            base.fc = nn.Linear(40, 30)
            assert "trained on this base" in refusal(tmp_path, base)

    def test_token_indices(self, tmp_path: Path) -> None:
        base, _ = text()
        save(peft_model(base, TrainableTokensConfig(token_indices=[7, 3], target_modules=["embed"])), tmp_path)
        assert "Give base=" in refusal(tmp_path)
        for indices in ([7], [7, 7], [7, 20], [-1, 7], [7, True], "all", None):
            assert "token indices" in refusal(change_config(tmp_path, token_indices=indices), base)

    @pytest.mark.parametrize(
        ("config", "tensors", "reason"),
        [
            (ShiraConfig(r=1, target_modules=["fc"]), {"shira_indices": np.full((2, 28), 16)}, "0 to 15 as indices"),
            (ShiraConfig(r=1, target_modules=["fc"]), {"shira_indices": np.full((2, 28), -1)}, "0 to 15 as indices"),
            (ShiraConfig(r=1, target_modules=["fc"]), {"shira_indices": np.full((2, 28), 0.5)}, "whole numbers"),
            (ShiraConfig(r=1, target_modules=["fc"]), {"shira_indices": np.full((2, 28), 1)}, "a duplicate"),
            (ShiraConfig(r=1, target_modules=["fc"]), {"shira_weight": np.zeros(9)}, "one value for each"),
            (C3AConfig(block_size=4, target_modules=["fc"]), {"c3a_kernel": np.zeros((1, 1, 100_000))}, "blocks of"),
            (C3AConfig(block_size=4, target_modules=["fc"]), {"c3a_kernel": np.zeros((2**20, 0, 2**20))}, "values in"),
            (FourierFTConfig(n_frequency=9, target_modules=["fc"]), {"fourierft_spectrum": np.zeros(193)}, "1 to 192"),
            (FourierFTConfig(n_frequency=9, target_modules=["fc"]), {"fourierft_spectrum": np.zeros(0)}, "values in"),
            (
                GraloraConfig(r=2, gralora_k=2, target_modules=["fc"]),
                {"gralora_A": np.zeros((2**20, 0, 2**20)), "gralora_B": np.zeros((2**20, 2**20, 0))},
                "values in gralora_A",
            ),
            (
                VBLoRAConfig(r=2, num_vectors=9, vector_length=4, target_modules=["fc"]),
                {"vblora_logits_A": np.zeros((2**40, 0, 9))},
                "values in vblora_logits_A",
            ),
            (
                VBLoRAConfig(r=2, num_vectors=9, vector_length=4, save_only_topk_weights=True, target_modules=["fc"]),
                {"vblora_logits_A_topk_indices": np.full((2, 3, 2), 9)},
                "0 to 8 as indices",
            ),
            (
                VBLoRAConfig(r=2, num_vectors=9, vector_length=4, save_only_topk_weights=True, target_modules=["fc"]),
                {"vblora_logits_A_topk_indices": np.full((2, 3, 2), 8)},
                "a duplicate",
            ),
            (
                UniLoraConfig(r=2, theta_d_length=9, save_indices=True, target_modules=["fc"]),
                {"unilora_indices_A": np.full((2, 12), 9)},
                "0 to 8 as indices",
            ),
            (
                SupertuningConfig(sparsity=0.9, target_modules=["fc"]),
                {"supertuning_indices": np.arange(19) + 174},
                "0 to 191 as indices",
            ),
            (
                RandLoraConfig(r=4, target_modules=["fc"]),
                {"randlora_lambda": np.zeros((0, 2**40))},
                "values in randlora_lambda",
            ),
            (RandLoraConfig(r=4, target_modules=["fc"]), {"randlora_A": np.zeros((4, 1, 12))}, "one randlora_A"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_tensors_that_cannot_be(self, tmp_path: Path, config: Any, tensors: Any, reason: str) -> None:
        base, _ = vision()
        save(peft_model(base, config), tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        saved = load_file(file)
        save_file(saved | {f"base_model.model.fc.{name}": tensor for name, tensor in tensors.items()}, file)
        assert reason in refusal(tmp_path, base)

    def test_adamss_does_not_save_its_groups(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, AdamssConfig(r=2, target_modules=["fc"])), tmp_path)
        assert "a clustering of the base weight" in refusal(tmp_path, base)

    def test_tied_rows_of_a_model_that_is_not_of_transformers(self, tmp_path: Path) -> None:
        base, _ = text()
        base.register_parameter("copy", base.get_parameter("embed.weight"))
        config = LoraConfig(r=2, target_modules=["query"], trainable_token_indices={"embed": [19, 4]})
        save(peft_model(base, config), tmp_path)
        assert "a tied weight of a layer of tests.helpers.formats.pefts" in refusal(tmp_path, base)


@pytest.mark.parametrize(("seed", "size", "count"), [(777, 384, 384), (0, 1, 1), (2**40 - 5, 100_000, 500), (-3, 7, 4)])
def test_permutations_are_those_of_torch(seed: int, size: int, count: int) -> None:
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    np.testing.assert_array_equal(first_of_permutation(seed, size, count), expected.numpy())

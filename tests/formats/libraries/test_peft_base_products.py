"""PEFT's methods whose change is a product with the base weight, against PEFT's own unmerged forward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    DeftConfig,
    FrodConfig,
    GloraConfig,
    HiraConfig,
    HRAConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    RoadConfig,
)
from torch import nn

from tests.helpers.formats.pefts import change_config, distance, error_of, peft_model, refusal, save, text, vision
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.formats import load_adapter

LIMITS = [pytest.param(torch.float32, 1e-5, id="float32"), pytest.param(torch.float64, 1e-10, id="float64")]
LAYERS = ["fc", "square", "stem"]


def oft(*modules: str, **fields: Any) -> OFTConfig:
    return OFTConfig(target_modules=list(modules), **({"oft_block_size": 4} | fields))


def boft(*modules: str, **fields: Any) -> BOFTConfig:
    return BOFTConfig(target_modules=list(modules), **({"boft_block_size": 3} | fields))


def glora(weights: str, through: str, biases: str) -> GloraConfig:
    return GloraConfig(r=3, target_modules=["fc", "square"], config_A_B=weights, config_C=through, config_D_E=biases)


def deft(**fields: Any) -> DeftConfig:
    return DeftConfig(r=3, target_modules=["fc", "square"], **fields)


def peanut(**fields: Any) -> PeanutConfig:
    return PeanutConfig(r=3, target_modules=["fc", "square"], **({"depth": 2} | fields))


def frod(*modules: str, **fields: Any) -> FrodConfig:
    return FrodConfig(target_modules=list(modules or ("fc", "square")), progressbar=False, **fields)


VISION = {
    "oft": oft("fc", "square", "point"),
    "oft by number of blocks": oft("fc", "square", "point", oft_block_size=0, r=3),
    "oft by the exact rotation": oft("fc", "point", use_cayley_neumann=False),
    "oft of one block": oft("fc", "point", block_share=True),
    "oft bounded": oft("fc", "point", coft=True, eps=0.6),
    "oft bounded in one block": oft("fc", coft=True, eps=0.6, block_share=True, use_cayley_neumann=False),
    **{f"oft of {n} terms": oft("fc", num_cayley_neumann_terms=n) for n in (2, 3, 4, 7)},
    "boft": boft("fc", "stem", "point"),
    "boft by number of blocks": boft("fc", "square", boft_block_size=0, boft_block_num=2),
    "hra": HRAConfig(r=3, target_modules=["fc", "stem", "point"]),
    "hra of one vector": HRAConfig(r=1, target_modules=["fc", "stem"]),
    "hra made orthogonal": HRAConfig(r=5, target_modules=["fc", "stem"], apply_GS=True),
    "hra of more vectors than inputs": HRAConfig(r=20, target_modules=["fc"]),
    "hira": HiraConfig(r=3, target_modules=["fc", "square", "stem", "point", "line", "volume"]),
    "road 1": RoadConfig(target_modules=["fc", "square"], variant="road_1", group_size=8),
    "road 2": RoadConfig(target_modules=["fc", "square"], variant="road_2", group_size=4),
    "road 4": RoadConfig(target_modules=["fc", "square"], variant="road_4", group_size=8),
    "glora": glora("lora", "lora", "constant"),
    "glora of vectors": glora("vector", "vector", "vector"),
    "glora of constants": glora("constant", "none", "none"),
    "glora of the bias": glora("none", "lora", "vector"),
    "deft": deft(),
    "deft with alpha": deft(alpha=5),
    "deft by qr": deft(decomposition_method="qr"),
    "deft that only takes out": deft(para=True, decomposition_method="qr"),
    "osf": OSFConfig(effective_rank=10, target_modules=["fc", "square"]),
    "osf of all but one": OSFConfig(effective_rank=1, target_modules=["fc", "square"]),
    **{f"peanut with {act}": peanut(act_fn=act) for act in ("relu", "gelu", "silu", "sigmoid", "tanh", "linear")},
    "peanut without layers": peanut(depth=0, scaling=0.3),
    "miss by tiles": MissConfig(r=4, init_weights="bat", target_modules=["fc", "square"]),
    "frod": frod(),
    "frod of many entries": frod(sparse_rate=0.3),
    "frod of the diagonal": frod(sparse_rate=0.0),
}
FLOAT32 = ("deft", "osf", "frod")  # what PEFT computes in float32, whatever the model's dtype is


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
class TestAgainstPeft:
    @pytest.mark.parametrize("name", VISION)
    def test_layers(self, tmp_path: Path, dtype: torch.dtype, limit: float, name: str) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, VISION[name], tmp_path)
        assert error < (max(limit, 1e-6) if name.startswith(FLOAT32) else limit)
        weights = dict(base.named_parameters())
        assert adapter.base_digests == {
            target: weight_digest(weights[target].detach().numpy()) for target in adapter.deltas
        }

    @pytest.mark.parametrize(
        "config",
        [
            oft("embed", "query"),
            oft("embed", block_share=True, use_cayley_neumann=False),
            HiraConfig(r=3, target_modules=["embed", "same", "wide", "query"]),
            DeftConfig(r=3, target_modules=["same", "wide"], fan_in_fan_out=True),
            frod("same", "wide", fan_in_fan_out=True, sparse_rate=0.1),
        ],
        ids=["oft", "oft of one block", "hira", "deft", "frod"],
    )
    def test_embeddings_and_transposed_layers(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, config: Any
    ) -> None:
        base, ids = text(dtype)
        assert error_of(base, ids, config, tmp_path)[0] < (
            max(limit, 1e-6) if isinstance(config, DeftConfig | FrodConfig) else limit
        )

    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("layer", ["wide", "stem", "square"])
    def test_a_butterfly(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        limit: float,
        layer: str,
        size: int,
    ) -> None:
        """PEFT runs more than one level with its kernel for CUDA alone, so this stands in for the kernel."""
        monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Kernel)
        torch.manual_seed(0)
        layers = {"wide": nn.Linear(32, 6), "square": nn.Linear(16, 16), "stem": nn.Conv2d(8, 4, 4, 2, 1)}
        shapes = {"wide": (3, 32), "square": (3, 16), "stem": (2, 8, 6, 7)}
        base = nn.Sequential(layers[layer]).to(dtype)
        x = torch.randn(shapes[layer], dtype=dtype)
        config = boft("0", boft_block_size=size, boft_n_butterfly_factor=3)
        assert error_of(base, x, config, tmp_path)[0] < limit

    def test_a_grouped_convolution_of_kernel_1(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(12, 9, 1, groups=3, stride=2, padding=1)).to(dtype)
        x = torch.randn(2, 12, 5, 6, dtype=dtype)
        assert error_of(base, x, oft("0", oft_block_size=2), tmp_path / "own")[0] < limit
        assert error_of(base, x, oft("0", block_share=True), tmp_path / "shared")[0] < limit
        path = save(peft_model(base, oft("0", oft_block_size=6)), tmp_path / "across")
        assert "no blocks within 4 inputs" in refusal(path, base)


class Kernel:
    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*level) for level in blocks])]  # type: ignore[no-untyped-call]


class TestForms:
    def test_frod_shares_its_basis_between_layers_of_one_role(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        block = nn.ModuleDict({"attention": nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(6, 6)})})})
        layers = nn.ModuleList([block, copy.deepcopy(block)])
        nn.init.normal_(layers.get_parameter("1.attention.output.dense.weight"))
        base = nn.ModuleDict({"layers": layers, "last": nn.Linear(6, 6)})
        model = peft_model(base, frod("dense", "last", sparse_rate=0.2))
        adapter = load_adapter(save(model, tmp_path), base=base)
        trained = dict(model.base_model.model.named_modules())
        names = {f"layers.{block}.attention.output.dense.weight" for block in (0, 1)}
        assert set(adapter.deltas) == names | {"last.weight"}
        for name, delta in adapter.deltas.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of sparse tensors
                expected = trained[name.removesuffix(".weight")].get_delta_weight("default").detach()
            assert distance(torch.from_numpy(delta.dense()), expected) < 1e-5

    def test_hra_is_of_its_rank(self, tmp_path: Path) -> None:
        base = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 20))
        save(peft_model(base, HRAConfig(r=2, target_modules=["0", "2"])), tmp_path)
        deltas = load_adapter(tmp_path, base=base).deltas
        assert deltas["0.weight"].ranks == (2, 8, 3, 3)
        assert deltas["2.weight"].ranks == (2, 2)

    def test_hra_keeps_a_small_change_of_reflections_that_undo_each_other(self, tmp_path: Path) -> None:
        """PEFT starts from equal pairs; factors that cancel would leave rounding of W in the change."""
        base, _ = vision()
        model = peft_model(base, HRAConfig(r=4, target_modules=["fc"]))
        layer = model.base_model.model.fc
        with torch.no_grad():
            vectors = layer.hra_u["default"]
            vectors.copy_(vectors[:, [0, 0, 1, 1]] + 1e-4 * torch.randn_like(vectors))
        got = load_adapter(save(model, tmp_path), base=base).deltas["fc.weight"].dense()
        weight = base.get_parameter("fc.weight").double()
        expected = weight @ layer.double().get_delta_weight("default") - weight
        assert distance(torch.from_numpy(got), expected.detach()) < 1e-6

    @pytest.mark.parametrize("name", ["road 2", "glora"])
    def test_the_bias_is_an_override_where_there_is_one(self, tmp_path: Path, name: str) -> None:
        base, x = vision()
        adapter = error_of(base, x, VISION[name], tmp_path)[1]
        assert set(adapter.deltas) == {"fc.weight", "square.weight"}
        assert set(adapter.overrides) == {"fc.bias"}


class TestRefusals:
    @pytest.mark.parametrize(
        "config",
        [
            oft("fc"),
            boft("fc"),
            *(VISION[name] for name in ("hra", "hira", "road 1", "glora", "deft", "osf", "peanut with relu", "frod")),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_no_base_and_another_base(self, tmp_path: Path, config: Any) -> None:
        base, _ = vision()
        save(peft_model(base, config), tmp_path)
        assert "Give base=, the model that the adapter was trained on" in refusal(tmp_path)
        base.fc = nn.Linear(13, 18)
        refusal(tmp_path, base)

    def test_oft_of_a_kernel(self, tmp_path: Path) -> None:
        """PEFT's forward adds overlapping patches: with rotations of nothing it is not the base either."""
        base, _ = vision()
        path = save(peft_model(base, oft("stem", oft_block_size=3)), tmp_path)
        assert "adds up its rotated patches where they overlap" in refusal(path, base)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"use_cayley_neumann": None}, "true or false as use_cayley_neumann"),
            ({"num_cayley_neumann_terms": 10**9}, "a whole number from 1 to 100"),
            ({"num_cayley_neumann_terms": 2.5}, "a whole number from 1 to 100"),
            ({"coft": True, "eps": None}, "a finite number as eps"),
            ({"block_share": True}, "block_share is set"),
        ],
    )
    def test_configurations_of_oft(self, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
        base, _ = vision()
        path = save(peft_model(base, oft("fc")), tmp_path)
        assert message in refusal(change_config(path, **fields), base)

    @pytest.mark.parametrize(
        ("config", "change", "message"),
        [
            (HRAConfig(r=2, target_modules=["fc"]), lambda u: u.zero_(), "a vector of length zero"),
            (HRAConfig(r=2, target_modules=["fc"], apply_GS=True), lambda u: u.fill_(1.0), "linearly dependent"),
            (boft("fc"), lambda r: r.mul_(1e30), "float32 can compute no rotation"),
        ],
        ids=["zero", "dependent", "huge"],
    )
    def test_values(self, tmp_path: Path, config: Any, change: Callable[[torch.Tensor], object], message: str) -> None:
        base, _ = vision()
        model = peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "hra_u" in name or "boft_R" in name:
                    change(parameter)
        assert message in refusal(save(model, tmp_path), base)

    @pytest.mark.parametrize("fields", [{"variant": "road_8"}, {"group_size": 3}, {"group_size": 5}, {"variant": []}])
    def test_configurations_of_road(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        base, _ = vision()
        path = save(peft_model(base, VISION["road 1"]), tmp_path)
        assert "an even group_size that divides the 16 outputs" in refusal(change_config(path, **fields), base)

    @pytest.mark.parametrize(
        ("name", "fields", "message"),
        [
            ("deft", {"decomposition_method": "lu"}, "relu or qr as decomposition_method"),
            ("peanut with relu", {"act_fn": "gelu_10"}, "act_fn relu, gelu, silu"),
            ("peanut with relu", {"depth": 3}, "as many encoders as depth"),
        ],
    )
    def test_other_configurations(self, tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
        base, _ = vision()
        path = save(peft_model(base, VISION[name]), tmp_path)
        assert message in refusal(change_config(path, **fields), base)

    def test_frod_without_its_projections(self, tmp_path: Path) -> None:
        base, _ = vision()
        path = save(peft_model(base, frod("fc", save_projection=False)), tmp_path)
        assert "save_projection=True" in refusal(path, base)

    def test_singular_values_that_are_alike(self, tmp_path: Path) -> None:
        base, _ = vision()
        with torch.no_grad():
            base.get_parameter("square.weight").copy_(torch.eye(16))
        path = save(peft_model(base, OSFConfig(effective_rank=3, target_modules=["square"])), tmp_path)
        assert "to determine which were replaced" in refusal(path, base)

    def test_a_bias_that_is_replaced_as_well(self, tmp_path: Path) -> None:
        base, _ = vision()
        path = save(peft_model(base, VISION["glora"]), tmp_path)
        assert "biases in one way" in refusal(change_config(path, bias="all"), base)

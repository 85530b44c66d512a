import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpeft_deploy.training import TuckerConfig
from tpeft_deploy.training.kinds import KINDS


def wrap(layer: nn.Module, ranks: Any, name: str = "default", **options: Any) -> Any:
    config = TuckerConfig(ranks=ranks, scale=1.5, init_weights=False, **options)
    (kind,) = (kind for kind in KINDS if isinstance(layer, kind.adapts))
    return kind(layer, name, config, config.ranks)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


def is_grouped(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) > 1


# torch says so of every even kernel with padding="same", adapter or not.
# torch says so once in a process, whichever test comes first.
pytestmark = even_kernel = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)


@even_kernel
class TestPathsAgree:
    def test_factors_dense_and_merged(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks)
        layer.tucker_break_even["default"] = 0
        dense = layer(case.x)
        chosen = [math.inf] if not is_grouped(case.layer) else []
        for limit in chosen:
            layer.tucker_break_even["default"] = limit
            assert difference(layer(case.x), dense) < 1e-12
        base = case.layer(case.x)
        assert difference(dense, base) > 1e-4
        layer.merge()
        assert difference(layer(case.x), dense) < 1e-12
        layer.unmerge()
        assert torch.equal(case.layer(case.x), base)

    def test_gradients(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks)
        case.layer.requires_grad_(False)
        gradients = []
        for limit in [0] if is_grouped(case.layer) else [0, math.inf]:
            layer.tucker_break_even["default"] = limit
            layer.zero_grad()
            layer(case.x).square().sum().backward()
            gradients.append([p.grad for p in layer.parameters() if p.requires_grad])
        assert gradients[0]
        for a, b in zip(gradients[0], gradients[-1], strict=True):
            assert a is not None
            assert b is not None
            assert difference(a, b) < 1e-11

    def test_delta_is_the_mode_products(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks)
        core, factors = layer._parts("default")
        weight = case.layer.weight
        letters = "abcde"[: core.ndim]
        operands: list[Any] = []
        for mode, letter in enumerate(letters):
            factor = factors.get(mode, torch.eye(weight.shape[mode]).double())
            operands += [factor, letter.upper() + letter]
        equation = f"{letters},{','.join(operands[1::2])}->{letters.upper()}"
        expected = 1.5 * torch.einsum(equation, core, *operands[::2])
        assert layer.get_delta_weight("default").shape == weight.shape
        assert difference(layer.get_delta_weight("default"), expected) < 1e-12

    def test_unbatched_input(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks)
        assert difference(layer(case.x[0]), layer(case.x)[0]) < 1e-12

    def test_starts_at_the_base(self, case: Any) -> None:
        base = case.layer(case.x)
        config = TuckerConfig(ranks=case.ranks)
        (kind,) = (kind for kind in KINDS if isinstance(case.layer, kind.adapts))
        assert torch.equal(kind(case.layer, "default", config, case.ranks)(case.x), base)


class TestChoiceOfPath:
    def test_low_ranks_always_run_through_factors(self) -> None:
        assert wrap(nn.Linear(64, 64), 8).tucker_break_even["default"] == math.inf
        assert wrap(nn.Conv2d(64, 64, 3), 8).tucker_break_even["default"] == math.inf

    def test_high_ranks_build_dw_for_many_positions(self) -> None:
        limit = wrap(nn.Linear(64, 64), 60).tucker_break_even["default"]
        build = 60 * 60 * 64 + 60 * 64 * 64
        factored = 64 * 60 + 60 * 60 + 60 * 64
        assert limit == build / (factored - 64 * 64)

    def test_groups_never_run_through_factors(self) -> None:
        assert wrap(nn.Conv2d(64, 64, 3, groups=64), 8).tucker_break_even["default"] == 0

    def test_the_path_follows_the_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = wrap(nn.Conv2d(16, 16, 3, stride=2), 15)
        taken: list[int] = []
        through = layer._through_factors

        def watched(x: Tensor, *rest: Any) -> Any:
            taken.append(len(x))
            return through(x, *rest)

        monkeypatch.setattr(layer, "_through_factors", watched)
        small, large = torch.randn(1, 16, 3, 3), torch.randn(4, 16, 64, 64)
        layer(small)
        layer(large)
        assert layer._positions(small) < layer.tucker_break_even["default"] < layer._positions(large)
        assert taken == [1]


class TestParameters:
    def test_a_mode_of_full_rank_has_no_factor(self) -> None:
        layer = wrap(nn.Conv2d(4, 16, 3), 8)
        assert tuple(layer.tucker_core["default"].shape) == (8, 4, 3, 3)
        assert sorted(layer._parts("default")[1]) == [0]

    def test_factors_start_orthonormal(self) -> None:
        layer = wrap(nn.Linear(12, 20), 5)
        for factor in layer._parts("default")[1].values():
            assert torch.allclose(factor.T @ factor, torch.eye(5), atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_output_has_the_base_dtype(self, dtype: torch.dtype) -> None:
        layer = wrap(nn.Linear(8, 8).to(dtype), 2)
        layer.tucker_core["default"] = layer.tucker_core["default"].float()
        for factor in layer.tucker_factor["default"].parameters():
            factor.data = factor.data.float()
        x = torch.randn(3, 8, dtype=dtype)
        assert layer(x).dtype == dtype
        merged = x @ layer.weight.T + layer.bias
        assert difference(layer(x).float(), merged.float()) < 2e-2

    def test_several_active_adapters_add_up(self) -> None:
        layer = wrap(nn.Linear(8, 8).double(), 2, "a")
        config = TuckerConfig(ranks=3, scale=0.5, init_weights=False)
        layer.update_layer("b", config, config.ranks)
        x = torch.randn(3, 8).double()
        layer.set_adapter(["a", "b"])
        both = layer(x)
        delta = layer.get_delta_weight("a") + layer.get_delta_weight("b")
        assert difference(both, layer.base_layer(x) + x @ delta.T) < 1e-12
        layer.set_adapter("b")
        layer.merge(adapter_names=["a"])
        layer.unmerge()
        layer.merge(adapter_names=["a", "b"])
        assert difference(layer(x), both) < 1e-12


@even_kernel
class TestDropout:
    def test_drops_only_while_training(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks, dropout=0.5)
        plain = layer.eval()(case.x)
        layer.merge()
        assert difference(layer(case.x), plain) < 1e-12
        layer.unmerge()
        assert not torch.equal(layer.train()(case.x), plain)

    def test_never_touches_the_base_branch(self) -> None:
        layer = wrap(nn.Linear(8, 8), 2, dropout=0.5)
        nn.init.zeros_(layer.tucker_core["default"])
        x = torch.randn(3, 8)
        assert torch.equal(layer.train()(x), layer.base_layer(x))


class TestPaddingIndex:
    def test_padding_has_no_gradient(self) -> None:
        layer = wrap(nn.Embedding(5, 4, padding_idx=0), 2)
        layer(torch.zeros(3, dtype=torch.long)).sum().backward()
        for parameter in (layer.tucker_core["default"], *layer.tucker_factor["default"].parameters()):
            assert parameter.grad is None or not parameter.grad.any()


class PadsItself(nn.Conv2d):
    """As timm's Conv2dSame: pads in its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


class Standardized(nn.Conv2d):
    """As weight-standardized convolutions: not linear in the weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = super()._conv_forward(input, (weight - weight.mean()) / weight.std(), bias)
        return output


class Scaled(nn.Embedding):
    """As Gemma's scaled word embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return 8.0 * super().forward(input)


class TestLayersWithTheirOwnForward:
    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (PadsItself(4, 6, 3), torch.randn(2, 4, 5, 5)),
            (Standardized(4, 6, 3), torch.randn(2, 4, 5, 5)),
            (Scaled(9, 6), torch.tensor([1, 2])),
        ],
    )
    def test_run_with_the_changed_weight(self, layer: nn.Module, x: Tensor) -> None:
        wrapped = wrap(layer.double(), 2)
        x = x.double() if x.is_floating_point() else x
        adapted, base = wrapped(x), layer(x)
        assert difference(adapted, base) > 1e-3
        adapted.sum().backward()
        assert wrapped.tucker_core["default"].grad is not None
        wrapped.merge()
        assert difference(layer(x), adapted) < 1e-12

    def test_refuse_dropout(self) -> None:
        with pytest.raises(ValueError, match="PadsItself overrides forward"):
            wrap(PadsItself(4, 6, 3), 2, dropout=0.1)


class TestConvTranspose:
    @pytest.mark.parametrize("limit", [0, math.inf])
    def test_the_size_that_a_caller_asks_for(self, limit: float) -> None:
        layer = wrap(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1).double(), [2, 3, 2])
        layer.tucker_break_even["default"] = limit
        x = torch.randn(2, 4, 5, 5).double()
        larger, smaller = layer(x, output_size=[10, 9]), layer(x)
        assert larger.shape[2:] == (10, 9)
        assert smaller.shape[2:] == (9, 9)
        layer.merge()
        assert difference(layer(x, [10, 9]), larger) < 1e-12


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_branches_and_merged_weights_agree(self, case: Any, dtype: torch.dtype) -> None:
        layer = wrap(case.layer.to(dtype), case.ranks)
        x = case.x.to(dtype) if case.x.is_floating_point() else case.x
        for limit in [0] if is_grouped(case.layer) else [0, math.inf]:
            layer.tucker_break_even["default"] = limit
            adapted = layer(x)
            layer.merge()
            error = difference(layer(x).float(), adapted.float())
            assert error < {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-5}[dtype]
            layer.unmerge()


class WithParts(nn.Linear):
    """A layer that models ask for more than torch's classes have."""

    window = 5

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.part = nn.Linear(4, 2)
        self.register_buffer("table", torch.arange(3))

    def project(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class TestAttributesOfTheBase:
    def test_every_one_is_answered(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks)
        for name in set(vars(case.layer)) - set(vars(nn.Module())) | {"__doc__"}:
            assert name == "__doc__" or getattr(layer, name) is getattr(case.layer, name), name
        assert getattr(layer, "bias", "none") is getattr(case.layer, "bias", "none")
        with pytest.raises(AttributeError, match="no_such_attribute"):
            layer.no_such_attribute  # noqa: B018

    def test_parts_buffers_and_class_attributes(self) -> None:
        base = WithParts()
        layer = wrap(base, 2)
        assert layer.part is base.part
        assert layer.table is base.table
        assert layer.window == 5
        assert "part.weight" not in dict(layer.named_parameters())

    def test_a_method_runs_with_the_change(self) -> None:
        layer = wrap(WithParts().double(), 2)
        x = torch.randn(3, 4).double()
        projected = layer.project(x)
        projected.sum().backward()
        assert layer.tucker_core["default"].grad is not None
        assert difference(projected, layer.base_layer.project(x)) > 1e-3
        layer.merge()
        assert difference(layer.base_layer.project(x), projected) < 1e-12
        assert difference(layer.project(x), projected) < 1e-12
        layer.enable_adapters(False)
        base = layer.project(x)
        layer.unmerge()
        assert torch.equal(base, layer.base_layer.project(x))

    def test_copies_and_pickles_are_whole(self, case: Any) -> None:
        layer = wrap(case.layer, case.ranks)
        layer.base_layer._hf_hook = object
        assert not hasattr(layer, "_hf_hook")
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer)
            assert torch.equal(other(case.x), layer(case.x))
            other.merge()
            assert not layer.merged


class TestReadersOfTheWeight:
    """Modules that read a layer's weight instead of calling it must not lose the adapter."""

    def test_attention_output_projection(self) -> None:
        attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
        x = torch.randn(2, 3, 8).double()
        base = attention(x, x, x)[0]
        wrapped = wrap(attention.out_proj, 2)
        attention.out_proj = wrapped
        adapted = attention(x, x, x)[0]
        assert difference(adapted, base) > 1e-3
        wrapped.merge()
        assert difference(attention(x, x, x)[0], adapted) < 1e-12

    def test_fused_encoder_layer(self) -> None:
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        encoder.linear1 = wrap(encoder.linear1, 2)
        x = torch.randn(2, 3, 8)
        called = encoder(x)
        with torch.inference_mode():
            fused = encoder(x)
        assert difference(fused, called) < 1e-5

    def test_is_the_base_weight_when_disabled(self) -> None:
        layer = wrap(nn.Linear(8, 8), 2)
        base = layer.base_layer.weight.detach().clone()
        layer.merge()
        layer.enable_adapters(False)
        assert torch.equal(layer.weight, base)
        assert torch.equal(layer(torch.eye(8)), layer.base_layer(torch.eye(8)))
        assert not layer.merged


class TestMerging:
    def test_safe_merge_refuses_and_leaves_the_base(self) -> None:
        layer = wrap(nn.Linear(4, 4), 2, "good")
        layer.update_layer("bad", TuckerConfig(ranks=2), 2)
        nn.init.constant_(layer.tucker_core["bad"], math.nan)
        base = layer.base_layer.weight.detach().clone()
        with pytest.raises(ValueError, match=r"'bad'.*NaN"):
            layer.merge(safe_merge=True, adapter_names=["good", "bad"])
        assert torch.equal(layer.base_layer.weight, base)
        assert not layer.merged

    def test_unmerge_is_exact_and_repeatable(self) -> None:
        layer = wrap(nn.Linear(64, 64), 8)
        base = layer.base_layer.weight.detach().clone()
        layer.merge()
        assert not torch.equal(layer.base_layer.weight, base)
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, base)

    def test_an_adapter_named_twice_is_merged_once(self) -> None:
        layer = wrap(nn.Linear(8, 8).double(), 2)
        x = torch.randn(3, 8).double()
        once = layer(x)
        layer.set_adapter(["default", "default"])
        assert torch.equal(layer(x), once)
        layer.merge(adapter_names=["default", "default"])
        assert difference(layer(x), once) < 1e-12


class TestRefusals:
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "not a plain parameter"),
            (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
            (nn.Linear(4, 4, dtype=torch.complex64), "complex64"),
        ],
    )
    def test_weights_that_cannot_change(self, layer: nn.Module, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            wrap(layer, 2)

    def test_arguments_are_not_ignored(self) -> None:
        with pytest.raises(TypeError):
            wrap(nn.Linear(4, 4), 2)(torch.randn(2, 4), 3)
        with pytest.raises(TypeError, match="mask"):
            wrap(nn.Linear(4, 4), 2)(torch.randn(2, 4), mask=None)

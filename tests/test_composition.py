"""Weighted sets of adapters as one, against torch, against numpy and against PEFT's own sum."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import nets
from tests.helpers.composed import Parts, merged, relative
from tests.helpers.exporters.layers import CASES
from tests.helpers.formats import pefts
from tests.helpers.property.deltas import changes_of_one_weight
from tpeft_deploy import Adapter, Runtime, export_bundle, load_adapter
from tpeft_deploy.composition import compose
from tpeft_deploy.errors import CompositionError
from tpeft_deploy.tucker import TuckerDelta


def change(shape: tuple[int, ...] = (6, 5), ranks: tuple[int, ...] = (2, 2), seed: int = 0) -> TuckerDelta:
    return nets.delta(shape, ranks, seed)


def adapter(seed: int = 0, name: str = "w", **fields: Any) -> Adapter:
    return Adapter({name: change(seed=seed)}, **fields)


class TestAgainstTorch:
    @pytest.mark.parametrize(
        "name",
        [
            *("linear, 3-D", "transformers Conv1D", "conv2d, strided", "conv2d, grouped", "conv1d", "embedding"),
            *("transposed 2-D, dilated", "tied embedding", "attention"),
        ],
    )
    def test_a_composed_adapter_serves_the_merged_model(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        module, inputs = case.build(torch.float32)
        made = [nets.adapter_for(module, case.targets, seed=seed) for seed in (10, 20, 30)]
        sizes = {target: tuple(module.get_parameter(target).shape) for target in case.targets}
        whole = Adapter({n: TuckerDelta(change(s, s, 40).core, (None,) * len(s), -0.5) for n, s in sizes.items()})
        export_bundle(module, {"a": made[0]}, tmp_path / "bundle", example_inputs=inputs)
        runtime = Runtime(tmp_path / "bundle", provider="cpu", threads=1)
        feeds = {key: tensor.numpy() for key, tensor in inputs.items()}
        sets: list[Parts] = [
            {"a": (made[0], 0.7), "b": (made[1], -1.3), "c": (made[2], 1)},
            {"a": (made[0], 0.25), "whole": (whole, 2), "off": (made[1], 0)},
            {"a": (made[0], -2)},
        ]
        for parts in sets:
            runtime.load("mix", compose(parts))
            got = runtime.run(feeds, task="mix")["output"]
            assert relative(got, merged(module, parts, inputs)) < 1e-5, parts
        runtime.load("mix", compose({"a": (made[0], 0), "b": (made[1], 0.0)}))
        np.testing.assert_array_equal(runtime.run(feeds, task="mix")["output"], runtime.run(feeds)["output"])

    def test_heads_and_gains_take_part_beside_deltas(self, tmp_path: Path) -> None:
        module, inputs = nets.conv_net()
        own = nets.conv_adapters(module)
        gain = 1 + 0.3 * np.random.default_rng(0).standard_normal((16, 1)).astype(np.float32)
        head = Adapter({}, own["two"].overrides)
        dora = replace(nets.adapter_for(module, {"up.weight": (5, 3)}, seed=9), gains={"up.weight": gain})
        export_bundle(module, own | {"dora": dora}, tmp_path / "bundle", example_inputs=inputs)
        runtime = Runtime(tmp_path / "bundle", provider="cpu", threads=1)
        feeds = {key: tensor.numpy() for key, tensor in inputs.items()}
        parts: Parts = {"head": (head, 1), "dora": (dora, 1.0), "partial": (own["partial"], -0.6)}
        runtime.load("mix", compose(parts))
        assert relative(runtime.run(feeds, task="mix")["logits"], merged(module, parts, inputs)) < 1e-5


class TestAgainstPeft:
    @pytest.mark.parametrize("modules", [["stem", "line"], ["fc", "square", "point"]], ids=["kernels", "matrices"])
    def test_cat_gives_the_same_weights(self, tmp_path: Path, modules: list[str]) -> None:
        from peft import LoraConfig

        base, _ = pefts.vision(torch.float64)
        model = pefts.peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=modules))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("other", LoraConfig(r=3, lora_alpha=4, target_modules=modules, use_rslora=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".other." in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        model = model.double()
        pefts.save(model, tmp_path)
        strengths = {"default": 0.7, "other": -1.2}
        paths = {"default": tmp_path, "other": tmp_path / "other"}
        mixed = compose({task: (load_adapter(paths[task], base=base), strengths[task]) for task in paths})
        model.add_weighted_adapter(list(strengths), list(strengths.values()), "mix", combination_type="cat")
        model.set_adapter("mix")
        weights = dict(model.merge_and_unload().named_parameters())
        assert set(mixed.deltas) == {f"{module}.weight" for module in modules}
        for name in mixed.deltas:
            got = mixed.merged(name, base.get_parameter(name).detach().numpy())
            np.testing.assert_allclose(got, weights[name].detach().numpy(), rtol=1e-10, atol=1e-12)
            assert min(mixed.deltas[name].ranks[:2]) <= 5


STRENGTHS = st.floats(-3, 3) | st.integers(-3, 3)


class TestLaws:
    @given(changes_of_one_weight(), st.data())
    def test_the_dense_of_a_set_is_the_weighted_sum(self, changes: list[TuckerDelta], data: st.DataObject) -> None:
        strengths = data.draw(st.lists(STRENGTHS, min_size=len(changes), max_size=len(changes)))
        parts = {
            str(place): (Adapter({"w": delta}), strength)
            for place, (delta, strength) in enumerate(zip(changes, strengths, strict=True))
        }
        got = compose(parts).deltas["w"]
        expected = sum(strength * delta.dense() for delta, strength in zip(changes, strengths, strict=True))
        np.testing.assert_allclose(got.dense(), expected, rtol=1e-9, atol=1e-8)
        if len(changes) > 1:
            whole = int(np.prod(got.shape))
            taking = [delta.parameters for delta, strength in zip(changes, strengths, strict=True) if strength]
            assert got.parameters <= whole or len(taking) <= 1


class TestRanks:
    def test_a_weight_that_one_part_changes_keeps_its_delta(self) -> None:
        one, other = adapter(0, "a"), adapter(1, "b")
        mixed = compose({"one": (one, 1), "other": (other, -0.5)})
        assert mixed.deltas["a"].core is one.deltas["a"].core
        assert mixed.deltas["b"].factors is other.deltas["b"].factors
        assert mixed.deltas["a"].scale == one.deltas["a"].scale
        assert mixed.deltas["b"].scale == -0.5 * other.deltas["b"].scale

    def test_strength_one_alone_is_the_adapter_itself(self) -> None:
        one = adapter()
        assert compose({"one": (one, 1)}) is one
        assert compose({"one": (one, 1.0), "other": (adapter(1), 0)}) is one

    def test_what_does_not_take_part_is_not_in_the_sum(self) -> None:
        mixed = compose({"a": (adapter(0), 0.5), "b": (adapter(1), 0), "c": (adapter(2, "v"), 0.5)})
        assert mixed.deltas["w"].ranks == (2, 2)

    def test_one_adapter_under_two_names_does_not_double_its_rank(self) -> None:
        one = adapter()
        mixed = compose({"a": (one, 0.5), "b": (one, 0.25)})
        assert mixed.deltas["w"].ranks == (2, 2)
        np.testing.assert_allclose(mixed.deltas["w"].dense(), 0.75 * one.deltas["w"].dense())

    def test_identities_on_different_sides_do_not_make_a_matrix_dense(self) -> None:
        random = np.random.default_rng(0)
        left = TuckerDelta(random.standard_normal((40, 2)), (None, random.standard_normal((30, 2))))
        right = TuckerDelta(random.standard_normal((3, 30)), (random.standard_normal((40, 3)), None))
        total = compose({"l": (Adapter({"w": left}), 2), "r": (Adapter({"w": right}), -1)}).deltas["w"]
        assert total.parameters == 5 * (40 + 30)
        np.testing.assert_allclose(total.dense(), 2 * left.dense() - right.dense(), atol=1e-12)

    def test_factors_stand_side_by_side_in_a_kernel(self) -> None:
        shape = (32, 24, 3, 3)
        both = [Adapter({"w": nets.delta(shape, (4, 3, 3, 3), seed)}) for seed in (0, 1)]
        assert compose({"a": (both[0], 2), "b": (both[1], 3)}).deltas["w"].ranks == (8, 6, 3, 3)

    def test_ranks_that_add_up_to_more_than_the_whole_are_summed_up(self) -> None:
        parts = {str(seed): (adapter(seed), 0.1 * seed + 0.1) for seed in range(6)}
        total = compose(parts).deltas["w"]
        assert total.factors == (None, None)
        expected = sum(strength * one.deltas["w"].dense() for one, strength in parts.values())
        np.testing.assert_allclose(total.dense(), expected, atol=1e-14)


GAINED = adapter(gains={"w": np.full((6, 1), 2, np.float32)})
HEAD = Adapter({}, {"head": np.ones((2, 3), np.float32)})
OTHER_HEAD = Adapter({}, {"head": np.zeros((4, 3), np.float32)})


class TestRefusals:
    @pytest.mark.parametrize(
        ("strength", "shown"),
        [
            (True, "bool True"),
            (np.True_, "bool"),
            (float("nan"), "float nan"),
            (float("-inf"), "float -inf"),
            ("0.5", "str '0.5'"),
            (None, "NoneType None"),
            (1j, "complex 1j"),
            (10**400, "int inf"),
        ],
    )
    def test_strengths_that_are_not_finite_numbers(self, strength: Any, shown: str) -> None:
        with pytest.raises(CompositionError, match="strength of 'one': expected a finite number") as caught:
            compose({"one": (adapter(), strength)})
        assert shown in str(caught.value)

    def test_numbers_of_numpy_are_strengths(self) -> None:
        one = adapter()
        for strength in (np.float32(0.5), np.float64(0.5), 0.5):
            assert compose({"one": (one, strength)}).deltas["w"].scale == 0.5 * one.deltas["w"].scale  # type: ignore[dict-item]
        assert compose({"one": (one, np.int64(1))}) is one  # type: ignore[dict-item]

    def test_an_empty_set(self) -> None:
        with pytest.raises(CompositionError, match=r"compose \{\}: expected at least one adapter"):
            compose({})

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({"dora": (GAINED, 0.7)}, r"compose {dora: 0.7}, weight 'w': expected strength 1 for 'dora', .*gains"),
            ({"a": (HEAD, 0.5), "b": (adapter(), 1)}, r"{a: 0.5, b: 1}, weight 'head': .*overrides.*got 0.5"),
            ({"a": (HEAD, 0)}, "weight 'head': expected strength 1"),
            ({"a": (GAINED, 1), "b": (adapter(), 0.7)}, r"{a: 1, b: 0.7}, weight 'w': .*gain of 'a' .*change by 'b'"),
            ({"a": (adapter(), 1), "b": (GAINED, 1)}, "weight 'w': expected the gain of 'b' alone"),
            ({"a": (GAINED, 1), "b": (GAINED, 1)}, "weight 'w': expected the gain of 'a' alone"),
            ({"a": (GAINED, 1), "b": (Adapter({}, {"w": np.ones((6, 5))}), 1)}, "the gain of 'a' alone"),
            ({"a": (HEAD, 1), "b": (adapter(0, "head"), 0.7)}, "weight 'head': expected the override of 'a' alone"),
            ({"a": (HEAD, 1), "b": (OTHER_HEAD, 1)}, r"override of 'a' of shape \(2, 3\), got another in 'b' of shape"),
            (
                {"a": (adapter(base_digests={"w": "a" * 64}), 1), "b": (adapter(base_digests={"w": "b" * 64}), 0.7)},
                r"weight 'w': expected the base weight of 'a' \(aaaaaaaaaaaa\.\.\.\), got another in 'b' \(bbbb",
            ),
            (
                {"a": (adapter(), 1), "b": (Adapter({"w": change((6, 4))}), 0.7)},
                r"weight 'w': expected a change of shape \(6, 5\), as in 'a', got \(6, 4\) in 'b'",
            ),
            ({"a": (adapter(), 1e300), "b": (adapter(1), 1e308)}, None),
            ({"a": (Adapter({"w": replace(change(), scale=1e10)}), 1e300)}, "weight 'w': expected a finite sum"),
        ],
    )
    def test_sets_without_an_exact_sum(self, parts: Parts, message: str | None) -> None:
        if message is None:
            assert np.isfinite(compose(parts).deltas["w"].core).all()
            return
        with pytest.raises(CompositionError, match=message) as caught:
            compose(parts)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("compose {")

    def test_what_cannot_be_told_apart_is_no_conflict(self) -> None:
        counter = {"norm.num_batches_tracked": np.array(3)}
        digests = {"w": "a" * 64}
        parts: Parts = {
            "a": (Adapter({}, {**HEAD.overrides, **counter}), 1),
            "b": (Adapter({}, {"head": HEAD.overrides["head"].copy()}), 1),
            "c": (adapter(0, base_digests=digests), -2),
            "d": (adapter(1, overrides={"norm.num_batches_tracked": np.array(9)}, base_digests=digests), 0.5),
            "e": (adapter(2, base_digests={"w": "b" * 64}), 0),
        }
        mixed = compose(parts)
        np.testing.assert_array_equal(mixed.overrides["head"], HEAD.overrides["head"])
        assert mixed.base_digests == digests
        assert mixed.source == "{a: 1, b: 1, c: -2, d: 0.5, e: 0}"

    def test_tied_names_are_one_weight(self) -> None:
        aliases = {"out": "w"}
        one, other = adapter(0), adapter(1, "out")
        total = compose({"a": (one, 1), "b": (other, -1)}, aliases=aliases).deltas
        assert set(total) == {"w"}
        np.testing.assert_allclose(total["w"].dense(), one.deltas["w"].dense() - other.deltas["out"].dense())
        for refused in (GAINED, Adapter({}, {"w": np.ones((6, 5))})):
            with pytest.raises(CompositionError, match="weight 'w'"):
                compose({"a": (refused, 1), "b": (other, 1)}, aliases=aliases)
        twice = Adapter({**one.deltas, **other.deltas})
        with pytest.raises(CompositionError, match=r"weight 'w': .*another under 'out', to which it is tied"):
            compose({"a": (twice, 0.5)}, aliases=aliases)

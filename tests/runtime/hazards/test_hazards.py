"""What has gone wrong where others switch adapters on ONNX Runtime, tried on this runtime: adapters.

"The matrix" below is what ONNX Runtime's own adapters (LoraAdapter, RunOptions.add_active_adapter) were found to do.
`test_hazards_of_files`, `test_hazards_of_inputs` and `test_hazards_on_disk` have the rest.
Sections of research, as in (research, 1.3), are those of research/onnxruntime-adapters.md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tests.helpers.composed import merged, relative
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle
from tpeft_deploy.errors import (
    AdapterError,
    BaseMismatch,
    FormatError,
    ShapeError,
    TpeftError,
    UnknownTarget,
)
from tpeft_deploy.tucker import TuckerDelta

Arrays = dict[str, np.ndarray]
INPUTS = {"pixels": np.random.default_rng(0).standard_normal((3, 1, 12, 14)).astype(np.float32)}
UP = (16, 8)  # the shape of up.weight


@pytest.fixture
def runtime(conv_bundle: Bundle) -> Runtime:
    return Runtime(conv_bundle.path, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A layer with two names, which tasks may change or replace."""
    module, inputs = nets.twice_net()
    whole = Adapter({}, {"first.weight": np.ones((4, 4), np.float32)})
    adapters = {"low": nets.adapter_for(module, {"first.weight": (2, 2)}, seed=1), "whole": whole}
    return export_bundle(module, adapters, tmp_path_factory.mktemp("twice") / "net", example_inputs=inputs)


def logits(runtime: Runtime, task: str = "base") -> np.ndarray:
    answer: np.ndarray = runtime.run(INPUTS, task=task)["logits"]
    return answer


def head(classes: int = 2, bias: int | None = None) -> dict[str, np.ndarray]:
    random = np.random.default_rng(classes)
    return {
        "head.weight": random.standard_normal((classes, 16)).astype(np.float32),
        "head.bias": random.standard_normal(classes if bias is None else bias).astype(np.float32),
    }


def up(shape: tuple[int, ...] = UP, value: float = 1.0) -> dict[str, TuckerDelta]:
    return {"up.weight": TuckerDelta(np.full(shape, value), (None,) * len(shape))}


class TestAdaptersThatDoNotFit:
    """A load that fails says so, and whoever was served goes on being served what he was."""

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            pytest.param(lambda: Adapter({"no.weight": up()["up.weight"]}), UnknownTarget, "'no.weight'", id="unknown"),
            pytest.param(lambda: Adapter(up() | {"no": up()["up.weight"]}), UnknownTarget, "'no'", id="partly unknown"),
            pytest.param(lambda: Adapter(up((8, 16))), ShapeError, r"\(16, 8\), got \(8, 16\)", id="transposed"),
            pytest.param(lambda: Adapter(up((4, 32))), ShapeError, r"got \(4, 32\)", id="as many numbers"),
            pytest.param(lambda: Adapter(up((16, 8, 1))), ShapeError, r"got \(16, 8, 1\)", id="an axis more"),
            pytest.param(
                lambda: Adapter({}, {"head.weight": head(2)["head.weight"].T}), ShapeError, r"16, 2\)", id="head turned"
            ),
            pytest.param(
                lambda: Adapter({}, {"head.weight": np.ones((10, 16), np.int8)}), ShapeError, "got int8", id="int8"
            ),
            pytest.param(lambda: Adapter({"pixels": up()["up.weight"]}), UnknownTarget, "'pixels'", id="an input"),
            pytest.param(
                lambda: Adapter({}, {"adapter_index": np.zeros(1, np.int64)}),
                UnknownTarget,
                "'adapter_index'",
                id="index",
            ),
            pytest.param(
                lambda: Adapter({}, {"up.weight.tpeft.up": np.ones((1, 16))}), UnknownTarget, "tpeft.up", id="a slot"
            ),
            pytest.param(lambda: Adapter(up(value=1e300)), AdapterError, "values that float32 holds", id="overflow"),
            pytest.param(
                lambda: Adapter(up(), base_digests={"up.weight": "0" * 64}), BaseMismatch, "another base", id="base"
            ),
            pytest.param(lambda: Adapter({}), FormatError, "no tensors at all", id="empty"),
            pytest.param(lambda: Adapter({}, {"head.bias": np.full(10, np.nan)}), FormatError, "NaN", id="NaN"),
            pytest.param(
                lambda: Adapter({"up.weight": TuckerDelta(np.ones((2, 2)), (np.ones((16, 2)), np.ones((8, 3))))}),
                ShapeError,
                "factor of mode 1",
                id="ranks disagree",
            ),
        ],
    )
    def test_a_bad_adapter_is_refused_and_the_old_one_served(
        self, runtime: Runtime, make: Callable[[], Adapter], error: type[TpeftError], message: str
    ) -> None:
        """The matrix: wrong shapes and dtypes are found only in a run; an input's name hits the input itself."""
        tasks, before = runtime.tasks, logits(runtime, "two")
        for task in ("two", "new"):
            with pytest.raises(error, match=message):
                runtime.load(task, make())
        assert runtime.tasks == tasks
        np.testing.assert_array_equal(logits(runtime, "two"), before)

    def test_values_beyond_float16_are_refused_for_a_base_in_float16(self, tmp_path: Path) -> None:
        """A cast makes them infinite without a word, and every answer NaN."""
        torch.manual_seed(0)
        module, x = nn.Sequential(nn.Linear(8, 16)).eval().half(), torch.randn(2, 8).half()
        deltas = {"0.weight": nets.delta(UP, (2, 2), 0)}
        bundle = export_bundle(module, {"a": Adapter(deltas)}, tmp_path / "half", example_inputs={"input": x})
        runtime = Runtime(bundle.path, provider="cpu", threads=1)
        with pytest.raises(AdapterError, match="values that float16 holds"):
            runtime.load("a", Adapter({"0.weight": TuckerDelta(np.full(UP, 7e4), (None, None))}))
        assert np.isfinite(runtime.run({"input": x.numpy()}, task="a")["output"]).all()

    @pytest.mark.parametrize("dtype", ["float64", "float16"])
    def test_other_floats_are_converted_not_reinterpreted(self, runtime: Runtime, dtype: str) -> None:
        """OrtValue.update_inplace compares element counts alone and reads another dtype's bytes (research, 0.5)."""
        exact = {name: array.astype(np.float16).astype(np.float32) for name, array in head().items()}
        runtime.load("exact", Adapter({}, exact))
        runtime.load("other", Adapter({}, {name: array.astype(dtype) for name, array in exact.items()}))
        np.testing.assert_array_equal(logits(runtime, "other"), logits(runtime, "exact"))

    @pytest.mark.parametrize(
        "overrides",
        [head(2, bias=17), {"head.weight": head(2)["head.weight"]}, {"head.bias": head(2)["head.bias"]}, head(10, 1)],
        ids=["2 and 17", "2 and the base's 10", "the base's 10 and 2", "10 and 1"],
    )
    def test_a_head_whose_parts_have_other_sizes_is_refused(self, runtime: Runtime, overrides: Arrays) -> None:
        """A lost or mixed head (DESIGN 8): torch refuses such a pair; padded, it answers."""
        with pytest.raises(AdapterError):
            runtime.load("mixed", Adapter({}, overrides))

    def test_two_changes_of_a_layer_with_two_names_are_refused(self, twice: Bundle) -> None:
        """Two adapters with overlapping names: the first one wins, without a word (the matrix)."""
        runtime = Runtime(twice.path, provider="cpu", threads=1)
        low = [nets.delta((4, 4), (2, 2), seed) for seed in (1, 2)]
        wholes = [np.full((4, 4), value, np.float32) for value in (1, 2)]
        for both in (
            Adapter({"first.weight": low[0], "second.weight": low[1]}),
            Adapter({}, {"first.weight": wholes[0], "second.weight": wholes[1]}),
        ):
            with pytest.raises(UnknownTarget, match="tied to"):
                runtime.load("both", both)

    def test_a_delta_and_an_override_of_a_layer_with_two_names_are_refused(self, twice: Bundle) -> None:
        """Under one name an Adapter refuses them itself; under two names they are one weight still."""
        runtime = Runtime(twice.path, provider="cpu", threads=1)
        whole = {"first.weight": np.ones((4, 4), np.float32)}
        with pytest.raises(AdapterError):
            runtime.load("both", Adapter({"second.weight": nets.delta((4, 4), (2, 2), 1)}, whole))


class TestAdaptersThatFitInPart:
    def test_weights_that_an_adapter_leaves_alone_stay_the_base(self, runtime: Runtime) -> None:
        """The matrix: a missing name takes a default, and whether that is the base is luck."""
        module, _ = nets.conv_net()
        part = nets.adapter_for(module, {"stem.weight": (2, 1, 2, 2)}, seed=8)
        runtime.load("part", part)
        expected = merged(module, {"part": (part, 1)}, {"pixels": torch.from_numpy(INPUTS["pixels"])})
        assert relative(logits(runtime, "part"), expected) < 1e-5

    def test_an_adapter_of_zeros_is_the_base_bit_for_bit(self, runtime: Runtime) -> None:
        runtime.load("zeros", Adapter(up(value=0.0)))
        np.testing.assert_array_equal(logits(runtime, "zeros"), logits(runtime))

    def test_one_adapter_under_two_names_is_two_tasks(
        self, runtime: Runtime, conv_adapters: dict[str, Adapter]
    ) -> None:
        """The matrix: the same adapter added twice."""
        for name in ("one", "other"):
            runtime.load(name, conv_adapters["two"])
        expected = logits(runtime, "one")
        np.testing.assert_array_equal(logits(runtime, "other"), expected)
        runtime.unload("other")
        np.testing.assert_array_equal(logits(runtime, "one"), expected)

    def test_a_name_that_is_loaded_again_answers_anew(self, runtime: Runtime) -> None:
        """A stale answer after a name was reloaded (DESIGN 8)."""
        for classes in (2, 17, 3, 2):
            runtime.load("again", Adapter({}, head(classes)))
            runtime.load("fresh", Adapter({}, head(classes)))
            assert logits(runtime, "again").shape == (3, classes)
            np.testing.assert_array_equal(logits(runtime, "again"), logits(runtime, "fresh"))

    def test_tasks_keep_their_own_rows_when_others_leave(self, runtime: Runtime) -> None:
        """An answer computed with another tenant's adapter (DESIGN 8): rows of a bank move up."""
        before = {task: logits(runtime, task) for task in ("base", "plain", "two", "wide")}
        runtime.unload("partial")
        runtime.load("aaa", Adapter({}, head(5)))
        for task, expected in before.items():
            np.testing.assert_allclose(logits(runtime, task), expected, rtol=1e-5, atol=1e-6)


class TestMemoryOfTheCaller:
    """The matrix: a collected LoraAdapter serves the base; what is overwritten is served as it is."""

    @staticmethod
    def make() -> Adapter:
        module, _ = nets.conv_net()
        return nets.adapter_for(
            module,
            {"up.weight": (3, 3), "stem.weight": (2, 1, 4, 4)},
            seed=3,
            overrides={"head.weight": (2, 16), "head.bias": (2,)},
        )

    @staticmethod
    def spoil(adapter: Adapter) -> None:
        for delta in adapter.deltas.values():
            for array in (delta.core, *delta.factors):
                if array is not None:
                    array[:] = 1e6
        for array in adapter.overrides.values():
            array[:] = -1e6

    def test_a_collected_adapter_is_served(self, runtime: Runtime) -> None:
        runtime.load("mine", self.make())
        expected = logits(runtime, "mine")
        gc.collect()
        kept = [np.full((16, 16), np.nan, np.float32) for _ in range(2000)]  # over whatever was freed
        np.testing.assert_array_equal(logits(runtime, "mine"), expected)
        assert len(kept) == 2000

    def test_arrays_overwritten_after_a_load_change_nothing(self, runtime: Runtime) -> None:
        adapter = self.make()
        runtime.load("mine", adapter)
        expected = logits(runtime, "mine")
        self.spoil(adapter)
        np.testing.assert_array_equal(logits(runtime, "mine"), expected)

    def test_arrays_overwritten_after_a_load_change_nothing_when_another_task_is_loaded(self, runtime: Runtime) -> None:
        adapter = self.make()
        runtime.load("mine", adapter)
        expected = logits(runtime, "mine")
        self.spoil(adapter)
        runtime.load("other", Adapter(up()))
        np.testing.assert_array_equal(logits(runtime, "mine"), expected)

    def test_inputs_and_answers_belong_to_the_caller(self, runtime: Runtime) -> None:
        """ONNX Runtime takes the memory of a numpy array as it is (research, 5)."""
        pixels = INPUTS["pixels"].copy()
        first = runtime.run({"pixels": pixels}, task="two")["logits"]
        kept = first.copy()
        pixels[:] = np.nan
        np.testing.assert_array_equal(first, kept)
        first[:] = np.nan
        np.testing.assert_array_equal(logits(runtime, "two"), kept)
        rows = runtime.run(INPUTS, tasks=["two", "base", "two"])["logits"]
        rows[0][:] = np.nan
        for row in rows[1:]:
            assert np.isfinite(row).all()

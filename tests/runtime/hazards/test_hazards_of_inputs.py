"""Inputs that ONNX Runtime, or numpy, would take for something else; and what sessions must never do by themselves.

Sections of research, as in (research, 1.3), are those of research/onnxruntime-adapters.md.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.helpers import nets
from tests.helpers.runtime.manifests import manifest
from tpeft_deploy import Bundle, Runtime, export_bundle
from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import InputError, RunError, UnknownTask
from tpeft_deploy.runtime import inputs as requests

PIXELS = np.random.default_rng(0).standard_normal((3, 1, 12, 14)).astype(np.float32)
TARGETS = {"embedding.weight": (2, 2), "mix.weight": (2, 2)}
IDS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def runtime(conv_bundle: Bundle) -> Runtime:
    return Runtime(conv_bundle.path, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    module, inputs = nets.text_net()
    path = tmp_path_factory.mktemp("text") / "text"
    return export_bundle(module, {"a": nets.adapter_for(module, TARGETS, seed=1)}, path, example_inputs=inputs)


@pytest.fixture(scope="module")
def text_runtime(text: Bundle) -> Runtime:
    return Runtime(text.path, provider="cpu", threads=1)


def every_other(array: np.ndarray) -> np.ndarray:
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), 7, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def unaligned(array: np.ndarray) -> np.ndarray:
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    buffer[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return buffer[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize(
    "layout",
    [every_other, np.asfortranarray, lambda array: array[::-1].copy()[::-1], read_only, unaligned],
    ids=["every other", "Fortran order", "negative strides", "read-only", "unaligned"],
)
def test_the_layout_of_an_input_does_not_matter(
    runtime: Runtime, text_runtime: Runtime, layout: Callable[[np.ndarray], np.ndarray]
) -> None:
    """IO binding takes an address: strides are not part of it. Where an input lies decides how ORT's vector code
    splits a sum (seen with AVX-512), so the answers are the same to rounding and not always to the bit."""
    for served, inputs in ((runtime, {"pixels": PIXELS}), (text_runtime, {"ids": IDS})):
        expected = served.run(inputs)
        got = served.run({name: layout(array) for name, array in inputs.items()})
        for name, array in expected.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(">f4"),
        PIXELS.astype(np.float64),
        PIXELS.astype(np.float16),
        PIXELS.astype(object),
        PIXELS.astype(str),
        PIXELS.view(np.int32),
        np.float32(1),
        PIXELS[0],
        PIXELS[:, :, :, :, None],
        PIXELS[:0],
        PIXELS.transpose(0, 1, 3, 2),
        None,
    ],
    ids=["big-endian", "f64", "f16", "objects", "text", "ints", "0-d", "no batch", "5-D", "no rows", "turned", "None"],
)
def test_what_is_no_such_array_is_refused_before_it_runs(runtime: Runtime, array: object) -> None:
    """Wrong dtypes were reinterpreted, and read past the end of a smaller array (research, 0.5)."""
    with pytest.raises(InputError, match="'pixels': expected"):
        runtime.run({"pixels": array})


def test_a_scalar_stays_one() -> None:
    model = manifest((Port("x", "float32", ("batch", 3)), Port("scale", "float32", ())), ())
    arrays = requests.check_inputs(model, {"x": np.zeros((2, 3), np.float32), "scale": np.float32(2)})
    assert arrays["scale"].shape == ()


def test_ragged_lists_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="'pixels'"):
        runtime.run({"pixels": [[1.0], [1.0, 2.0]]})


@pytest.mark.parametrize("name", ["adapter_index", "stem.weight.tpeft.up", "up.weight"])
def test_what_the_runtime_binds_cannot_be_fed(runtime: Runtime, name: str) -> None:
    """A name in the feed and in the adapter: one of them wins without a word (the matrix of native adapters)."""
    with pytest.raises(InputError, match=f"an unknown '{name}'"):
        runtime.run({"pixels": PIXELS, name: np.zeros(1, np.int64)})


@pytest.mark.parametrize("task", ["adapters/two", "TWO", "two ", "", 3, None])
def test_a_name_that_is_nearly_a_task_is_not_the_base(runtime: Runtime, task: Any) -> None:
    """An adapter that matches nothing silently serves the base (vLLM 55193)."""
    with pytest.raises((UnknownTask, InputError), match="for row 2"):
        runtime.run({"pixels": PIXELS}, tasks=["two", "two", task])
    if task is not None:
        with pytest.raises((UnknownTask, InputError)):
            runtime.run({"pixels": PIXELS}, task=task)


def test_a_row_of_nan_does_not_touch_its_neighbours(runtime: Runtime) -> None:
    """One bad row that fails its neighbours (DESIGN 8)."""
    tasks = ["two", "plain", "wide"]
    expected = runtime.run({"pixels": PIXELS}, tasks=tasks)["logits"]
    bad = PIXELS.copy()
    bad[1] = np.nan
    got = runtime.run({"pixels": bad}, tasks=tasks)["logits"]
    assert np.isnan(got[1]).all()
    for row in (0, 2):
        np.testing.assert_array_equal(got[row], expected[row])


@pytest.mark.parametrize("row", ["task", "tasks"])
def test_a_negative_index_does_not_read_another_task(text: Bundle, row: str) -> None:
    """An answer computed with another tenant's adapter (DESIGN 8): Gather takes -1 for the last entry of a table.

    torch refuses -1, and the runtime may; what it must not do is to let the answer of `b` depend on what `a` is.
    """
    module, _ = nets.text_net()
    runtime = Runtime(text.path, provider="cpu", threads=1)
    runtime.load("b", nets.adapter_for(module, TARGETS, seed=5))
    ask: dict[str, Any] = {"task": "b"} if row == "task" else {"tasks": ["b"]}
    ids = {"ids": np.full((1, 5), -1)}
    before = runtime.run(ids, **ask)["output"]
    runtime.load("a", nets.adapter_for(module, TARGETS, seed=6))
    np.testing.assert_array_equal(runtime.run(ids, **ask)["output"], before)


@pytest.mark.parametrize("index", [20, -21, 2**40, -(2**62)])
class TestIndicesThatNoTableHas:
    def test_nothing_is_read_beyond_the_table_and_others_are_served(self, text_runtime: Runtime, index: int) -> None:
        expected = text_runtime.run({"ids": IDS}, tasks=["a", "base"])["output"]
        bad = IDS.copy()
        bad[1, 2] = index
        for arguments in ({"task": "a"}, {"task": "base"}, {"tasks": ["a", "base"]}):
            with pytest.raises(InputError, match=rf"'ids', row 1: expected indices below 20,.* got {index} at"):
                text_runtime.run({"ids": bad}, **arguments)
        got = text_runtime.run({"ids": IDS}, tasks=["a", "base"])["output"]
        np.testing.assert_array_equal(got, expected)

    def test_the_cpu_refuses_them_in_bundles_that_do_not_tell_the_limit(
        self, text: Bundle, tmp_path: Path, index: int
    ) -> None:
        manifest = text.manifest
        untold = dataclasses.replace(
            manifest, inputs=tuple(dataclasses.replace(p, below=None) for p in manifest.inputs)
        )
        shutil.copytree(text.path, tmp_path / "old")
        (tmp_path / "old/manifest.json").write_text(untold.to_json())
        with pytest.raises(RunError, match="out of"):
            Runtime(tmp_path / "old", provider="cpu", threads=1).run({"ids": np.full((1, 5), index)}, task="a")


class TestSessions:
    @pytest.fixture
    def sessions(self, conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[onnxruntime.InferenceSession]:
        """All sessions that a runtime opens."""
        opened: list[onnxruntime.InferenceSession] = []

        class Watched(onnxruntime.InferenceSession):  # type: ignore[misc]
            def __init__(self, *positional: object, **named: object) -> None:
                super().__init__(*positional, **named)
                opened.append(self)

        monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
        runtime = Runtime(conv_bundle.path, provider="cpu", threads=2)
        runtime.run({"pixels": PIXELS}, tasks=["two", "base", "wide"])
        assert opened
        return opened

    def test_they_never_fall_back_by_themselves(self, sessions: list[onnxruntime.InferenceSession]) -> None:
        """A failed run resets the session to the CPU and runs again, with no more than printed text (research, 6)."""
        assert not any(session._enable_fallback for session in sessions)

    def test_their_threads_do_not_spin(self, sessions: list[onnxruntime.InferenceSession]) -> None:
        """Pools that spin against each other doubled the time of a batch (DESIGN 9)."""
        for session in sessions:
            options = session.get_session_options()
            assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
            assert options.intra_op_num_threads == 2

    def test_their_quantised_products_keep_their_accuracy(self, sessions: list[onnxruntime.InferenceSession]) -> None:
        for session in sessions:
            entry = session.get_session_options().get_session_config_entry("session.qdq_matmulnbits_accuracy_level")
            assert entry == "1"


def test_gradients_do_not_come_along(runtime: Runtime) -> None:
    """A torch tensor that requires grad has no numpy array: refused, not detached without a word."""
    with pytest.raises((InputError, RuntimeError)):
        runtime.run({"pixels": torch.from_numpy(PIXELS.copy()).requires_grad_()})

"""Files that are no adapters, or damaged ones: refused by name, while the old adapter is served on.

Sections of research, as in (research, 1.3), are those of research/onnxruntime-adapters.md.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import AdapterError, FormatError

INPUTS = {"pixels": np.random.default_rng(0).standard_normal((3, 1, 12, 14)).astype(np.float32)}


@pytest.fixture
def runtime(conv_bundle: Bundle) -> Runtime:
    return Runtime(conv_bundle.path, provider="cpu", threads=1)


def logits(runtime: Runtime, task: str) -> np.ndarray:
    answer: np.ndarray = runtime.run(INPUTS, task=task)["logits"]
    return answer


def spoilt(adapter: Adapter, name: str, array: np.ndarray) -> bytes:
    """A canonical file with one tensor replaced."""
    data = adapter.to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])["__metadata__"]
    return save({**load(data), name: array}, metadata=header)


class TestFiles:
    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda data: data[:-1], id="a byte short"),
            pytest.param(lambda data: data[: len(data) // 2], id="half"),
            pytest.param(lambda data: data[:4], id="four bytes"),
            pytest.param(lambda data: b"", id="empty"),
            pytest.param(lambda data: bytes(len(data)), id="zeros"),
            pytest.param(lambda data: data + b"\0", id="a byte more"),
            pytest.param(lambda data: None, id="missing"),
        ],
    )
    def test_damaged_files_are_refused_and_the_old_one_served(
        self,
        runtime: Runtime,
        conv_adapters: dict[str, Adapter],
        tmp_path: Path,
        damage: Callable[[bytes], bytes | None],
    ) -> None:
        """The matrix: truncated, zeroed, empty, 4-byte and nonexistent files; a failed re-load keeps the content."""
        before, file = logits(runtime, "two"), tmp_path / "adapter.safetensors"
        data = damage(conv_adapters["two"].to_bytes())
        if data is not None:
            file.write_bytes(data)
        for task in ("two", "new"):
            with pytest.raises(FormatError, match=r"adapter\.safetensors") as caught:
                runtime.load(task, file)
            assert "\n" not in str(caught.value)
        assert "new" not in runtime.tasks
        np.testing.assert_array_equal(logits(runtime, "two"), before)

    @pytest.mark.parametrize(
        ("name", "array", "message"),
        [
            ("delta/up.weight/core", np.full((2, 7), np.nan, np.float32), "NaN|finite"),
            ("delta/up.weight/factor.0", np.full((16, 2), np.inf, np.float32), "NaN|finite"),
            ("override/head.bias", np.array([0, -np.inf], np.float32), "NaN|finite"),
            ("delta/up.weight/factor.0", np.ones((16, 3), np.float32), "factor of mode 0"),
            ("delta/up.weight/factor.0", np.ones((2, 16), np.float32), "factor of mode 0"),
            ("delta/up.weight/core", np.ones((2, 7), np.int8), "floating point"),
            ("delta/more.weight/core", np.ones((2, 2), np.float32), "belongs to no target"),
        ],
        ids=["NaN", "inf", "-inf in a head", "ranks disagree", "a factor turned", "int8", "a tensor too many"],
    )
    def test_files_with_bad_tensors_are_refused(
        self,
        runtime: Runtime,
        conv_adapters: dict[str, Adapter],
        tmp_path: Path,
        name: str,
        array: np.ndarray,
        message: str,
    ) -> None:
        """.onnx_adapter files have no checksum: 47 % of 600 mutations were served (research, 1.3)."""
        before, file = logits(runtime, "two"), tmp_path / "adapter.safetensors"
        file.write_bytes(spoilt(conv_adapters["two"], name, array))
        with pytest.raises(AdapterError, match=message):
            runtime.load("two", file)
        np.testing.assert_array_equal(logits(runtime, "two"), before)

    def test_a_pickle_is_not_run(self, runtime: Runtime, tmp_path: Path) -> None:
        """A pickle accepted from a tenant (DESIGN 8)."""
        trace = tmp_path / "trace"

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return trace.write_text, ("ran",)

        for name in ("adapter.safetensors", "adapter.pt", "adapter.bin"):
            (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
            with pytest.raises(AdapterError):
                runtime.load("bomb", tmp_path / name)
        assert not trace.exists()

    def test_a_graph_is_no_adapter(self, runtime: Runtime, conv_bundle: Bundle) -> None:
        """An ONNX graph accepted from a tenant (DESIGN 8)."""
        with pytest.raises(AdapterError):
            runtime.load("graph", conv_bundle.path / "banked.onnx")

"""Which of the two banked graphs the runtime opens on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tests.helpers.exporters.layers import CASES
from tests.helpers.exporters.matrix import adapters_of
from tpeft_deploy import Bundle, Runtime, export_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    case = CASES["depthwise, blocked"]
    module, inputs = case.build(torch.float32)
    place = tmp_path_factory.mktemp("cpu") / "bundle"
    return export_bundle(module, adapters_of(case, module, "delta"), place, example_inputs=inputs)


def test_the_portable_graph_answers_where_the_fast_one_cannot_be_opened(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[str] = []
    real = onnxruntime.InferenceSession

    def session(path: str, *args: Any, **options: Any) -> object:
        opened.append(Path(path).name)
        if path.endswith(".cpu.onnx") and refused:
            raise ort.Fail("ReorderInput(1) is not a registered function/op")
        return real(path, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    pixels = {"x": np.random.default_rng(0).standard_normal((3, 16, 9, 11)).astype(np.float32)}
    tasks = ["a", "base", "b"]
    refused = False
    fast = Runtime(bundle.path, provider="cpu").run(pixels, tasks=tasks)["output"]
    assert opened == ["banked.cpu.onnx"]
    refused = True
    runtime = Runtime(bundle.path, provider="cpu")
    portable = runtime.run(pixels, tasks=tasks)["output"]
    assert opened[1:] == ["banked.cpu.onnx", "banked.onnx"]
    assert "banked.cpu.onnx not used (ReorderInput" in runtime.provider_reason
    assert "banked.cpu.onnx not used" in caplog.text
    np.testing.assert_allclose(fast, portable, rtol=1e-4, atol=1e-6)

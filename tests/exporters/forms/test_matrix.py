"""The test matrix: layer kind x form x dtype x what changes, every one against torch, row by row, at two shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.exporters.layers import CASES
from tests.helpers.exporters.matrix import LIMITS, adapters_of, changes, error, feeds, merged, resized, session
from tpeft_deploy import Adapter, Runtime, export_bundle

# Of the others, `make test` has the weight changes in 32 bits.
WHOLE = {
    "linear, 3-D",
    "fused qkv",
    "conv2d, strided",
    "depthwise, blocked",
    "transposed, grouped",
    "embedding",
    "norms",
}


def quick(name: str, change: str, dtype: torch.dtype) -> bool:
    return name in WHOLE or (change, dtype) == ("delta", torch.float32)


MATRIX = [
    pytest.param(
        name,
        change,
        dtype,
        id=f"{name}-{change}-{str(dtype).removeprefix('torch.')}",
        marks=[] if quick(name, change, dtype) else pytest.mark.thorough,
    )
    for name, case in CASES.items()
    for change in changes(case)
    for dtype in LIMITS
    if dtype == torch.float32 or change == "delta"
]


@pytest.mark.parametrize(("name", "change", "dtype"), MATRIX)
def test_every_form_equals_the_merged_model(tmp_path: Path, name: str, change: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    module, inputs = case.build(dtype)
    adapters = adapters_of(case, module, change)
    shapes = {key: {0: "batch"} | case.free.get(key, {}) for key in inputs}
    bundle = export_bundle(
        module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes, folded=True
    )
    rows_wanted = "group" if change in case.group else "each"
    assert bundle.manifest.rows == rows_wanted, bundle.manifest.rows_reason
    runtime = Runtime(bundle.path, provider="cpu")
    files = [file for file in bundle.manifest.files if file.startswith("factored")]
    assert ("factored.cpu.onnx" in files) == ("blocked" in name and dtype == torch.float32)
    factored = [session(bundle.path / file) for file in files]
    exact, limit = module.float(), LIMITS[dtype]
    tasks = ["b", "base", "a", "part", "a"]
    for rows, more in ((len(tasks), 0), (len(tasks), 3)):
        batch = resized(case, inputs, rows, more)
        wide = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
        mixed = runtime.run(feeds(batch), tasks=tasks)["output"]
        for row, task in enumerate(tasks):
            expected = merged(exact, adapters.get(task), {key: t[row : row + 1] for key, t in wide.items()})[0]
            assert error(np.asarray(mixed[row]), expected) <= limit, (task, row)
        for task, adapter in adapters.items():
            expected = merged(exact, adapter, wide)
            assert error(np.asarray(runtime.run(feeds(batch), task=task)["output"]), expected) <= limit
            (got,) = session(bundle.path / "folded" / f"{task}.onnx").run(None, feeds(batch))
            assert error(got, expected) <= limit
            for form in factored:
                (got,) = form.run(None, feeds(batch) | bundle.factors(task))
                assert error(got, expected) <= limit
    if "grouped" not in name and "depthwise" not in name and rows_wanted == "each":
        assert not any(target.kind == "weight" for target in bundle.manifest.targets)


def test_the_matrix_can_fail() -> None:
    case = CASES["linear, 3-D"]
    module, inputs = case.build(torch.float32)
    adapter = adapters_of(case, module, "delta")["a"]
    doubled = {name: replace(delta, scale=2 * delta.scale) for name, delta in adapter.deltas.items()}
    wrong = merged(module, Adapter(doubled), inputs)
    assert error(wrong, merged(module, adapter, inputs)) > 1e-2

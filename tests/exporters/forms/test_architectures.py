"""Real architectures, whole: every linear and conv adapted, in every form, at two shapes, mixed rows included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.helpers.exporters.architectures import HALF, MODELS, adapters_for, merged
from tpeft_deploy import Runtime, export_bundle
from tpeft_deploy.exporters.bases.bundle import BundleBase
from tpeft_deploy.exporters.oracle.subject import Subject


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )


QUICK = {"ViT", "BERT", "DeBERTa-V3", "ResNet with BatchNorm", "Conv1d net"}
CASES = [
    pytest.param(name, torch.float32, id=f"{name}-float32", marks=[] if name in QUICK else [pytest.mark.thorough])
    for name in MODELS
]
# All of them in 16 bits take minutes: two here, four in the dry run, the others behind `make soak`.
CASES += [
    pytest.param(
        name, torch.float16, id=f"{name}-float16", marks=pytest.mark.thorough if name in HALF[::2] else pytest.mark.soak
    )
    for name in MODELS
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_real_architecture_in_every_form(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module, inputs, shapes = MODELS[name]()
    adapters = adapters_for(module)
    module = module.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    bundle = export_bundle(
        module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes, folded=True
    )
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    rounding = bundle.manifest.rounding
    assert (rounding is None) == (dtype == torch.float32)
    limit = 1e-5 if rounding is None else max(rounding.limits.values())
    if rounding is not None:
        assert rounding.limits == {name: max(2e-3, 4 * own) for name, own in rounding.measured.items()}
        assert limit < 1e-2
    assert {check["form"] for check in bundle.manifest.gate} >= {"base", "folded", "factored", "banked", "mixed rows"}
    base = BundleBase(bundle)  # the exported graph: another trace of the model takes as long as the test
    subject = Subject(base, base.graph().graph)
    sizes = subject.shapes
    assert len(sizes) == 2
    assert all(sizes[0][free] != sizes[1][free] for free in sizes[0])

    runtime = Runtime(bundle.path, provider="cpu")
    exact = module.float()
    tasks = ["rank2", "base", "rank3", "base", "rank2"]
    for free in sizes:
        batch = subject.inputs(free | {"batch": len(tasks)})
        wide = {key: torch.from_numpy(value) for key, value in batch.items()}
        wide = {key: value.float() if value.is_floating_point() else value for key, value in wide.items()}
        mixed = list(runtime.run(batch, tasks=tasks).values())
        for task in set(tasks):
            expected = merged(exact, adapters.get(task), wide)
            rows = [row for row, own in enumerate(tasks) if own == task]
            for got, wanted in zip(mixed, expected, strict=True):
                assert error(np.asarray(got)[rows], wanted[rows]) <= limit, task
            if task != "base":
                feeds = dict(batch)
                folded = session(bundle.path / "folded" / f"{task}.onnx").run(None, feeds)
                factored = session(bundle.path / "factored.onnx").run(None, feeds | bundle.factors(task))
                for one, other, wanted in zip(folded, factored, expected, strict=True):
                    assert max(error(one, wanted), error(other, wanted)) <= limit, task

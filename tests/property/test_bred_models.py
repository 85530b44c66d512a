"""Whatever a model and whatever an adapter: every form computes what the training library computes unmerged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.helpers import nets
from tests.helpers.property.bred_models import breed_adapter, breed_model, inputs_for
from tpeft_deploy import Adapter, Runtime, export_bundle, load_adapter
from tpeft_deploy.tucker import TuckerDelta

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and LyCORIS, on layers and shapes as small as these

ADAPTERS = 5
LIMIT = 1e-5
ROW_LIMIT = 3e-5  # of one row, in which few numbers share the error

Arrays = dict[str, np.ndarray[Any, Any]]


def error(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / max(float(np.linalg.norm(expected)), 1e-6))


def compare(what: str, got: Arrays, expected: Arrays, limit: float = LIMIT) -> None:
    for name, array in expected.items():
        assert error(got[name], array) <= limit, f"{what}, output {name}"


def check(seed: int, place: Path) -> None:
    """Compare all forms of a random model and `ADAPTERS` random adapters with the libraries."""
    base = breed_model(seed)
    rows = ADAPTERS + 2
    x = inputs_for(base, rows)
    adapters, expected = {}, {}
    with torch.no_grad():
        expected["base"] = {name: tensor.numpy() for name, tensor in base(x).items()}
        for number in range(ADAPTERS):
            file, forward = breed_adapter(seed, number, place / f"a{number}")
            expected[f"a{number}"] = {name: tensor.numpy() for name, tensor in forward(x).items()}
            adapters[f"a{number}"] = load_adapter(file, base=base)
    bundle = export_bundle(base, adapters, place / "bundle", example_inputs={"x": inputs_for(base, 2)}, folded=True)
    feeds = {"x": x.numpy()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    factored = onnxruntime.InferenceSession(bundle.path / "factored.onnx", options, ["CPUExecutionProvider"])
    names = [output.name for output in factored.get_outputs()]
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        for task, wanted in expected.items():
            compare(f"seed {seed}, {task} banked", runtime.run(feeds, task=task), wanted)
            if task == "base":
                continue
            got = factored.run(names, feeds | dict(bundle.factors(task)))
            compare(f"seed {seed}, {task} factored", dict(zip(names, got, strict=True)), wanted)
            folded = onnxruntime.InferenceSession(
                bundle.path / "folded" / f"{task}.onnx", options, ["CPUExecutionProvider"]
            )
            compare(f"seed {seed}, {task} folded", dict(zip(names, folded.run(names, feeds), strict=True)), wanted)
        tasks = [list(expected)[(3 * row + seed) % len(expected)] for row in range(rows)]
        mixed = runtime.run(feeds, tasks=tasks)
        for row, task in enumerate(tasks):
            got = {name: mixed[name][row] for name in names}
            compare(f"seed {seed}, row of {task}", got, {n: a[row] for n, a in expected[task].items()}, ROW_LIMIT)


@pytest.mark.parametrize("seed", range(10))
def test_every_form_computes_what_the_library_computes(tmp_path: Path, seed: int) -> None:
    check(seed, tmp_path)


def test_a_conv_that_one_task_replaces_and_another_changes(tmp_path: Path) -> None:
    base = breed_model(103)
    delta = TuckerDelta(np.ones((1, 6, 1, 1), np.float32), (np.ones((5, 1), np.float32), None, None, None))
    adapters = {
        "replaces": Adapter({}, {"dense.weight": np.ones((5, 6, 1, 1), np.float32)}),
        "changes": Adapter({"dense.weight": delta}),
        "dense": Adapter({"dense.weight": nets.delta((5, 6, 1, 1), (5, 6, 1, 1), 1)}),
    }
    export_bundle(base, adapters, tmp_path / "bundle", example_inputs={"x": inputs_for(base, 2)})


@pytest.mark.soak
@pytest.mark.parametrize("start", range(100, 500, 20))
def test_two_thousand_adapters_of_four_hundred_models(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 20):
        place = tmp_path / str(seed)
        place.mkdir()
        check(seed, place)

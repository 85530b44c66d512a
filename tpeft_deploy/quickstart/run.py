"""The quickstart: training, export, measurement and report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.torch import save

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.exporters import export_bundle
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.progress import Steps
from tpeft_deploy.quickstart import evaluate
from tpeft_deploy.quickstart.data import TASKS, Digits, load_digits
from tpeft_deploy.quickstart.measure import switching
from tpeft_deploy.quickstart.model import WEIGHTS, digits
from tpeft_deploy.quickstart.place import output_directory
from tpeft_deploy.quickstart.report import write_report
from tpeft_deploy.quickstart.results import Results, Sample
from tpeft_deploy.quickstart.train import Trained, train_all
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.sessions.providers import choose

__all__ = ["run"]

_ROWS = 16  # rows of every task in a mixed batch
_PACKAGES = ("torch", "peft", "onnx", "onnxscript", "numpy", "scikit-learn")

_BASE_MODULE = '''\
"""The quickstart's trained base; on the command line, BASE is digits_base:base."""

from pathlib import Path

from tpeft_deploy.quickstart.model import trained


def base():
    """Return the module and its example inputs."""
    return trained(Path(__file__).parent)
'''


def run(out: Path, *, provider: str, seed: int, effort: float, on_stage: Steps, begin: float) -> Results:
    """Run the quickstart; arguments as for `run_quickstart`, `begin` is its start by `time.perf_counter`."""
    # First, so that an unusable provider fails now and not after a minute of training.
    choice = choose(provider)
    seconds: dict[str, float] = {}
    with output_directory(out) as place:
        train, test = load_digits(seed)
        tests = {task.name: task.examples(test, seed) for task in TASKS} | {BASE_TASK: test}
        with _timed(seconds, "train"):
            trained = train_all(train, seed=seed, effort=effort, on_stage=on_stage)
        with _timed(seconds, "export"):
            bundle = _export(trained, place, on_stage)
        with _timed(seconds, "measure"):
            runtime = Runtime(bundle.path, provider=provider)
            answers = evaluate.run_forms(trained, bundle, runtime, choice, tests, rows=_ROWS, on_stage=on_stage.part)
            on_stage.part("time switching between tasks")
            folded = bundle.path / "folded" / f"{TASKS[0].name}.onnx"
            cost = switching(runtime, folded, choice, tasks=runtime.tasks, pixels=test.pixels[:1])
        results = Results(
            out=out,
            tasks=tuple(
                evaluate.task_result(task, trained, bundle, answers[task.name], tests[task.name]) for task in TASKS
            ),
            base=evaluate.base_result(trained, answers[BASE_TASK], test),
            switching=cost,
            sample=_write_sample(place, tests),
            test_digits=len(test),
            rows_per_batch=_ROWS * len(tests),
            provider=runtime.provider,
            seed=seed,
            seconds={**seconds, "total": time.perf_counter() - begin},
            versions={"onnxruntime": onnxruntime.__version__} | {name: version(name) for name in _PACKAGES},
        )
        (place / "results.json").write_text(json.dumps(results.to_json(), indent=1) + "\n")
        on_stage.part("write the report")
        write_report(place / "report.html", results, answers, tests)
    return results


def _export(trained: Trained, place: Path, on_stage: Steps) -> Bundle:
    on_stage("export")
    (place / WEIGHTS).write_bytes(save(trained.base.state_dict()))
    (place / "digits_base.py").write_text(_BASE_MODULE)
    for task, adapted in trained.adapters.items():
        adapted.save_pretrained(str(place / "adapters" / task))
    _, example_inputs = digits()
    return export_bundle(
        trained.base,
        {task: load_adapter(place / "adapters" / task) for task in trained.adapters},
        place / "bundle",
        example_inputs=example_inputs,
        name="digits",
        folded=True,
        progress=lambda stage: on_stage.part(f"export: {stage}"),
    )


def _write_sample(place: Path, tests: Mapping[str, Digits]) -> Sample:
    """Write a small mixed batch as input for `tpeft-deploy run`, and as a request to a server."""
    # Two digits: one upright and one turned, in the task "upright".
    _, chosen = np.unique(tests["upright"].labels, return_index=True)
    rows = [(task, row) for row in chosen for task in TASKS]
    pixels = np.stack([tests[task.name].pixels[row] for task, row in rows])
    np.savez(place / "sample.npz", pixels=pixels)
    given = {"name": "pixels", "datatype": "FP32", "shape": pixels.shape, "data": pixels.ravel().tolist()}
    names = [task.name for task, _ in rows]
    adapter = {"name": "adapter", "datatype": "BYTES", "shape": [len(names)], "data": names}
    (place / "request.json").write_text(json.dumps({"inputs": [given, adapter]}) + "\n")
    return Sample(
        tasks=tuple(task.name for task, _ in rows),
        answers=tuple(task.answers[tests[task.name].labels[row]] for task, row in rows),
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - begin

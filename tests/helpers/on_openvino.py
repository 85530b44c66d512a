"""What the runtime does with OpenVINO; runs with the interpreter of `make openvino`, prints JSON.

.venv-openvino/bin/python -m tests.helpers.on_openvino run BUNDLE PLACE
.venv-openvino/bin/python -m tests.helpers.on_openvino sessions BUNDLE
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.folding.compare import agree
from tpeft_deploy.runtime.sessions import openvino_provider
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.runtime.sessions.providers import choose


def run(path: Path, place: Path) -> dict[str, Any]:
    """Run each PLACE/*.json on the inputs beside it and write the outputs, twice from two threads at once."""
    found: dict[str, Any] = {"errors": {}}
    with Runtime(path, provider="openvino", threads=1) as runtime:
        found |= {"provider": runtime.provider, "reason": runtime.provider_reason}
        for request in sorted(place.glob("*.json")):
            asked = json.loads(request.read_text())
            inputs = dict(np.load(request.with_suffix(".npz")))
            for task in asked.pop("fold", []):
                runtime.pin(task, folded=True)
            try:
                outputs = runtime.run(inputs, **asked)
                np.savez(request.with_suffix(".out.npz"), **_flat(outputs))
                found[request.stem] = _worst_of_threads(runtime, inputs, asked, outputs)
            except TpeftError as error:
                found["errors"][request.stem] = str(error)
    return found


def _flat(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name: np.concatenate(value) if isinstance(value, list) else value for name, value in outputs.items()}


def _worst_of_threads(runtime: Runtime, inputs: dict[str, Any], asked: dict[str, Any], expected: Any) -> float:
    errors: list[float] = []

    def again() -> None:
        errors.extend(agree(_flat(runtime.run(inputs, **asked)), _flat(expected)) for _ in range(5))

    threads = [threading.Thread(target=again) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(errors) if len(errors) == 10 else float("inf")


def sessions(path: Path) -> dict[str, Any]:
    """Open the graphs of a bundle by hand; the error of the base in bfloat16 tells whether hints are followed."""
    bundle = Bundle.open(path)
    inputs = bundle.example()
    found: dict[str, Any] = {}
    own = SessionFactory.of(bundle.manifest, choose("openvino"))
    exact = Plain(path / "base.onnx", own.reference).run(inputs)
    found["exact"] = agree(Plain(path / "base.onnx", own).run(inputs), exact)
    narrow = {"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}
    with mock.patch.object(openvino_provider, "_EXACT", narrow):
        found["bfloat16"] = agree(Plain(path / "base.onnx", own).run(inputs), exact)
    refused = {}
    attempts: dict[str, Callable[[], object]] = {
        "factored": lambda: own.open(path / "factored.onnx"),
        "cuda graphs": lambda: Runtime(path, provider="openvino", cuda_graphs=True),
        "cuda": lambda: choose("cuda"),
        "tensorrt": lambda: choose("tensorrt"),
    }
    for form, attempt in attempts.items():
        try:
            attempt()
        except TpeftError as error:
            refused[form] = str(error)
    return found | {"auto": choose("auto").provider, "refused": refused}


if __name__ == "__main__":
    commands: dict[str, Callable[..., dict[str, Any]]] = {"run": run, "sessions": sessions}
    command, *arguments = sys.argv[1:]
    try:
        document = commands[command](*map(Path, arguments))
    except TpeftError as refusal:
        document = {"refused": f"{type(refusal).__name__}: {refusal}"}
    print(json.dumps(document))

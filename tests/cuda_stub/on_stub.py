"""What ONNX Runtime's CUDA provider does with a bundle's graphs; runs with the stub's interpreter, prints JSON.

    LD_LIBRARY_PATH=STUB CUDA_STUB_LOG=FILE STUB/venv/bin/python -m tests.cuda_stub.on_stub BUNDLE OPTIMISED [COMPONENT]

Optimised graphs are written to the directory OPTIMISED, for those who have the onnx package.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.gpu_fixed import Fixed, Place
from tpeft_deploy import Bundle
from tpeft_deploy.bundle.directory import BANKED_CUDA, MODEL
from tpeft_deploy.runtime.adapters.bank import Bank, Layout
from tpeft_deploy.runtime.sessions import providers
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, Cuda
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs, factored_graph
from tpeft_deploy.tucker import Array

ROWS = 4
FORMS = ("base", "factored", "banked one", "banked each")


class Log:
    """What the stub logged since it was asked last."""

    def __init__(self) -> None:
        self._path = Path(os.environ["CUDA_STUB_LOG"])
        self._read = 0
        self._library = ctypes.CDLL("libcudart.so.13")

    def take(self) -> Counter[str]:
        """Kinds of calls with their number, copies also with their bytes; launches are kernels and library calls.

        Pointer arrays are those of the products that take a pointer for each matrix, from the host.
        """
        self._library.stub_mark(b"read")  # so that there is a file
        lines = self._path.read_text().splitlines()
        new, self._read = lines[self._read :], len(lines)
        found: Counter[str] = Counter()
        for line in new:
            what, _, detail = line.partition("\t")
            if what in ("kernel", "library"):
                found["launches"] += 1
                found["pointer arrays"] += "gemmbatched" in detail.lower()
            elif what == "copy":
                found[detail] += 1
            elif what == "copied":
                kind, size = detail.split()
                found[f"{kind} bytes"] += int(size)
            elif what != "mark":
                found[f"{what} {detail}".strip() if what == "recording" else what] += 1
        return found


def bank_of(bundle: Bundle, file: str) -> Bank:
    """A bank on the device for a banked graph, with the bundle's tasks in turn."""
    layout = Layout.of(bundle, bundle.manifest.packing if file == BANKED_CUDA else ())
    rows = [layout.rows(bundle.factors(task)) for task in islice(cycle(bundle.tasks), ROWS)]
    shapes = layout.widest({name: array.shape for name, array in row.items()} for row in rows)
    bank = Bank.allocate(layout, shapes, ROWS + 1, "cuda")
    for number, row in enumerate(rows, 1):
        bank.write(number, row)
    return bank


def feeds(bundle: Bundle, form: str, inputs: dict[str, Array], values: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a form."""
    if form == "factored":
        return inputs | bundle.factors(next(iter(bundle.tasks)), factored_graph("cuda", bundle.manifest))
    if form.startswith("banked"):
        index = np.arange(1, ROWS + 1) if form == "banked each" else np.array([1])
        return inputs | values | {"adapter_index": index}
    return inputs


def batch(bundle: Bundle) -> dict[str, Array]:
    """The example with a fixed number of rows."""
    manifest = bundle.manifest
    free = {port.name for port in manifest.inputs if manifest.batch_axis in port.shape[:1]}
    example = bundle.example()
    return {
        name: np.ascontiguousarray(array[np.arange(ROWS) % len(array)] if name in free else array)
        for name, array in example.items()
    }


def run(place: Place, session: onnxruntime.InferenceSession, fed: dict[str, Any], log: Log) -> dict[str, int]:
    """The calls of a second run with everything on the device."""
    fixed = Fixed(place, session, fed)
    fixed()
    log.take()
    fixed()
    return dict(log.take())


def refusal(file: Path, choice: providers.Choice, half: bool) -> str:
    """Why a graph cannot be recorded, or nothing."""
    try:
        session = providers.open_session(file, choice, half=half, cuda=Cuda(graphs=True))
    except (RuntimeError, *ORT_ERRORS) as error:
        return "control flow" if "control flow" in str(error) else "copies"
    return "control flow" if providers.control_flow(session) else ""


def main(path: Path, optimised: Path, component: Path = Path(MODEL)) -> None:
    """Print what is found of each form."""
    choice, log, bundle = providers.choose("cuda"), Log(), Bundle.open(path).components[component.name]
    path = bundle.path
    place = Place(path, choice, 0.0)
    half = SessionFactory.of(bundle.manifest, choice).half
    banked = ServedGraphs.on("cuda", bundle.manifest).banked
    inputs, bank = batch(bundle), bank_of(bundle, banked)
    files = dict(zip(FORMS, ("base.onnx", factored_graph("cuda", bundle.manifest), banked, banked), strict=True))
    found: dict[str, Any] = {}
    for form in FORMS:
        if form == "banked each" and bundle.manifest.rows != "each":
            continue
        file = path / files[form]
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimised / f"{form}.onnx")
        session = providers.open_session(file, choice, half=half, options=options, cuda=Cuda(placement=True))
        found[form] = {
            "on cpu": [node.split()[0] for node in providers.nodes_on_cpu(session)],
            "calls": run(place, session, feeds(bundle, form, inputs, dict(bank.values)), log),
            "not recordable": refusal(file, choice, half),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

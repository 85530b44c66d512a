"""What the branch of a convolution stores and costs: a LoRA of rank 8 on one conv 3 x 3, as LoCon and PEFT write it.

    python -m benchmarks.conv_branches [--before CHECKOUT] [--repeats N] [--json]

Bytes: the slots of the branch over the file's numbers.  Time: one run of the folded, factored and banked form (one row,
and four rows of four adapters) over the base's, medians of runs that take turns in one process with one thread.  With
--before, bundles written by the code of another checkout run among them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from tpeft_deploy import Adapter, export_bundle
from tpeft_deploy.bundle import slots
from tpeft_deploy.exporters.proof.bundle_graphs import BANKED, banks
from tpeft_deploy.tucker import TuckerDelta

RANK, ROWS = 8, 4
BYTES = (64, 128, 320, 640)  # channels
TIMES = ((320, 32), (640, 32))  # channels, height = width
Calls = dict[str, Callable[[], object]]


def write(place: Path, channels: int, size: int) -> None:
    """A bundle of one conv with adapters, and what its graphs are fed."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(channels, channels, 3, padding=1)).eval()
    example = {"input": torch.randn(2, channels, size, size)}
    random = np.random.default_rng(0)

    def lora() -> Adapter:
        down = random.standard_normal((RANK, channels, 3, 3), np.float32) / 100
        up = random.standard_normal((channels, RANK), np.float32) / 100
        return Adapter({"0.weight": TuckerDelta(down, (up, None, None, None), 0.5)})

    adapters = {f"lora{row}": lora() for row in range(ROWS)}
    bundle = export_bundle(module, adapters, place, example_inputs=example, folded=True)
    factors = bundle.factors("lora0")
    np.savez(place / "factored.npz", **factors)  # type: ignore[arg-type]
    np.savez(place / "banked.npz", **banks(bundle, {"base": None, **adapters})[BANKED])  # type: ignore[arg-type]
    stored = sum(array.nbytes for array in factors.values())
    (place / "bytes.json").write_text(json.dumps([adapters["lora0"].nbytes, stored]))


def write_by(checkout: str, place: Path, channels: int, size: int) -> None:
    """As `write`, by the code of another checkout."""
    command = [sys.executable, os.path.abspath(__file__), "--write", str(place), str(channels), str(size)]
    environment = os.environ | {"PYTHONPATH": str(Path(checkout).resolve())}
    subprocess.run(command, check=True, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)


def calls(place: Path, channels: int, size: int, name: str) -> Calls:
    """A run of every form, by name; all but the base's are checked against the folded form."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    random = np.random.default_rng(1)
    image = random.standard_normal((1, channels, size, size), np.float32)
    feeds = {form: dict(np.load(place / f"{form}.npz")) for form in ("factored", "banked")}
    inputs: dict[str, tuple[str, dict[str, Any]]] = {
        "base": ("base.onnx", {"input": image}),
        "folded": ("folded/lora0.onnx", {"input": image}),
        "factored": ("factored.onnx", {"input": image, **feeds["factored"]}),
        "banked": ("banked.onnx", {"input": image, **feeds["banked"], slots.INDEX: np.array([1])}),
    }
    rows = {"input": np.concatenate([image] * ROWS)}
    inputs["base, 4 rows"] = ("base.onnx", rows)
    inputs["banked, 4 rows"] = ("banked.onnx", rows | feeds["banked"] | {slots.INDEX: np.arange(ROWS) + 1})
    made: Calls = {}
    for form, (file, fed) in inputs.items():
        session = onnxruntime.InferenceSession(str(place / file), options, providers=["CPUExecutionProvider"])
        made[f"{form}{name}"] = lambda session=session, fed=fed: session.run(None, fed)[0]  # type: ignore[misc]
    expected = np.asarray(made[f"folded{name}"]())
    for form in ("factored", "banked", "banked, 4 rows"):
        error = np.linalg.norm(np.asarray(made[form + name]())[:1] - expected) / np.linalg.norm(expected)
        if not error < 1e-5:
            raise SystemExit(f"{form}{name} is wrong: relative error {error:.1e}")
    return made


def measure(channels: int, size: int, before: str | None, repeats: int) -> dict[str, float]:
    """Form -> its time over the base's for as many rows; and bytes of the branch over the file's."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"": Path(folder) / "now"}
        write(places[""], channels, size)
        if before is not None:
            places[", before"] = Path(folder) / "before"
            write_by(before, places[", before"], channels, size)
        held = {name: json.loads((place / "bytes.json").read_text()) for name, place in places.items()}
        found = {f"bytes over file{name}": stored / own for name, (own, stored) in held.items()}
        if not repeats:
            return found
        made = {
            form: call for name, place in places.items() for form, call in calls(place, channels, size, name).items()
        }
        runs: dict[str, list[float]] = {form: [] for form in made}
        for _ in range(repeats):
            for form, call in made.items():
                start = time.perf_counter()
                call()
                runs[form].append(time.perf_counter() - start)
    times = {form: statistics.median(values) for form, values in runs.items()}
    bases = {form: "base, 4 rows" if "rows" in form else "base" for form in times}
    return found | {form: own / times[bases[form]] for form, own in times.items() if not form.startswith("base")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(Path(options.write[0]), int(options.write[1]), int(options.write[2]))
        return
    found = {f"{channels} channels": measure(channels, 8, options.before, 0) for channels in BYTES}
    found |= {f"{c} x {s}²": measure(c, s, options.before, options.repeats) for c, s in TIMES}
    if options.json:
        print(json.dumps(found))
        return
    for case, ratios in found.items():
        for form, ratio in ratios.items():
            print(f"{case:14}{form:28}{ratio:8.3f}")


if __name__ == "__main__":
    main()

"""How long it takes to read a rank-8 adapter of all 72 linears of a ViT-base from a warm file cache.

    python benchmarks/load_adapter.py [--json]

Goal: at most 15 ms and at most 4 times the file's size in memory; no weight change is ever made dense.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from tpeft_deploy import Adapter, TuckerDelta, load_adapter
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.write import locon as to_locon
from tpeft_deploy.formats.write import peft_lora as to_peft_lora

GOAL_MS = 15.0
GOAL_MEMORY = 4.0
LAYERS = 12
LINEARS = {
    "attention.attention.query": (768, 768),
    "attention.attention.key": (768, 768),
    "attention.attention.value": (768, 768),
    "attention.output.dense": (768, 768),
    "intermediate.dense": (3072, 768),
    "output.dense": (768, 3072),
}


def vit_adapter(rank: int = 8) -> Adapter:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    return Adapter(
        {
            f"vit.encoder.layer.{layer}.{name}.weight": TuckerDelta(
                matrix(rank, rank), (matrix(outputs, rank), matrix(inputs, rank)), 0.5
            )
            for layer in range(LAYERS)
            for name, (outputs, inputs) in LINEARS.items()
        },
        {"classifier.weight": matrix(100, 768), "classifier.bias": matrix(100)},
    )


def write_all(place: Path) -> dict[str, Path]:
    adapter = vit_adapter()
    canonical, peft, locon = place / "tpeft.safetensors", place / "peft", place / "locon.safetensors"
    canonical.write_bytes(adapter.to_bytes())
    to_peft_lora.write(adapter, peft)
    to_locon.write(Adapter(adapter.deltas), locon)
    return {"tpeft": canonical, "peft-lora": peft, "bfloat16": in_bfloat16(peft, place / "bfloat16"), "locon": locon}


def milliseconds(call: Callable[[], object], repeats: int = 31) -> tuple[float, float]:
    """Median and largest of several runs after one that fills the file cache."""
    call()
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        runs.append((time.perf_counter() - start) * 1e3)
    return statistics.median(runs), max(runs)


def memory(call: Callable[[], object], path: Path) -> float:
    """The largest memory that Python held while loading, over the size of the files."""
    files = [path] if path.is_file() else list(path.iterdir())
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / sum(file.stat().st_size for file in files)
    finally:
        tracemalloc.stop()


def in_bfloat16(source: Path, place: Path) -> Path:
    """A PEFT directory's copy with its tensors cut to bfloat16, which loading widens to float32."""
    place.mkdir()
    (place / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: t.bfloat16() for name, t in tensors.items()}, place / "adapter_model.safetensors")
    return place


def names_only() -> BaseView:
    """A base of the right names and shapes, without values: what underscore names are resolved against."""
    weights = {name: np.broadcast_to(np.float32(0), d.shape) for name, d in vit_adapter().deltas.items()}
    return BaseView("ViT-base", weights)


def main() -> None:
    base = names_only()
    with tempfile.TemporaryDirectory() as place:
        rows = {}
        for name, path in write_all(Path(place)).items():
            given = base if name == "locon" else None
            call = partial(load_adapter, path, base=given)
            rows[name] = (*milliseconds(call), memory(call, path))
    if "--json" in sys.argv:
        print(json.dumps({name: {"median_ms": m, "max_ms": w, "memory": x} for name, (m, w, x) in rows.items()}))
        return
    for name, (median, worst, held) in rows.items():
        verdict = "within" if median <= GOAL_MS and held <= GOAL_MEMORY else "above"
        goals = f"{GOAL_MS:g} ms and {GOAL_MEMORY:g} times"
        print(f"{name:10} {median:6.2f} ms (at most {worst:.2f} ms), {held:.2f} times the file; {verdict} {goals}")


if __name__ == "__main__":
    main()

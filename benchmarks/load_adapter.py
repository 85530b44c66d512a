"""How long it takes to read a rank-8 adapter of all 72 linears of a ViT-base from a warm file cache.

    python benchmarks/load_adapter.py [--json]

Goal: at most 15 ms for our own file and for a PEFT LoRA directory, and no weight change is ever made dense.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tpeft_deploy import Adapter, TuckerDelta, load_adapter
from tpeft_deploy.formats import to_locon, to_peft_lora
from tpeft_deploy.formats.module import BaseView

GOAL_MS = 15.0
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
    return {"tpeft": canonical, "peft-lora": peft, "locon": locon}


def milliseconds(call: Callable[[], object], repeats: int = 31) -> tuple[float, float]:
    """Median and largest of several runs after one that fills the file cache."""
    call()
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        runs.append((time.perf_counter() - start) * 1e3)
    return statistics.median(runs), max(runs)


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
            rows[name] = milliseconds(lambda path=path, given=given: load_adapter(path, base=given))  # type: ignore[misc]
    if "--json" in sys.argv:
        print(json.dumps({name: {"median_ms": m, "max_ms": w} for name, (m, w) in rows.items()}))
        return
    for name, (median, worst) in rows.items():
        verdict = "within" if median <= GOAL_MS else "above"
        print(f"{name:10} {median:6.2f} ms (at most {worst:.2f} ms), {verdict} the goal of {GOAL_MS:g} ms")


if __name__ == "__main__":
    main()

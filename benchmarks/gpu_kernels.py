"""Which kernels a run of each form of an encoder consists of, and how long each takes on the device.

python -m benchmarks.gpu_kernels DIR --bundle encoder --out OUT     # needs PyTorch with CUDA, whose profiler it uses

OUT gets kernels-BUNDLE.json: form -> kernel -> [launches of a run, microseconds of a run].
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch  # loads CUDA's libraries, so it comes first
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_fixed import Fixed, Place
from benchmarks.gpu_questions import tokens
from benchmarks.gpu_serving import bank_of, graph_of
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.sessions.providers import choose
from tpeft_deploy.runtime.sessions.served_graphs import factored_graph

RUNS = 5


def kernels(run: Fixed) -> dict[str, tuple[float, float]]:
    """Launches and microseconds of one run by kernel, from the profiler's own record of the device."""
    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            found[event.name].append(event.device_time_total)
    return {name: (len(times) / RUNS, sum(times) / RUNS) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bundle", default="encoder")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    place = Place(options.directory, choose("cuda"), 1.0)
    bundle = Bundle.open(options.directory / options.bundle)
    inputs = tokens(options.rows)
    bank, _ = bank_of(bundle, options.rows, "cuda")
    factored = factored_graph("cuda", bundle.manifest)
    feeds = {
        "base": inputs,
        "factored": {**inputs, **bundle.factors("one", factored)},
        "banked": {**bank.values, **inputs, "adapter_index": np.arange(1, options.rows + 1)},
    }
    report = {}
    files = {"base": "base.onnx", "factored": factored, "banked": graph_of(bundle, "cuda")}
    for form, fed in feeds.items():
        run = Fixed(place, bundle.path / files[form], fed)
        found = kernels(run)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        report[form] = found
        launches, busy = sum(n for n, _ in found.values()), sum(us for _, us in found.values())
        wall = 1e6 * statistics.median(times)
        print(f"{options.bundle} {form}: {launches:.0f} launches, {busy:.0f} us busy, {wall:.0f} us a run")
        for name, (count, us) in sorted(found.items(), key=lambda own: -own[1][1])[:14]:
            print(f"  {us:8.1f} us {count:5.0f}  {name[:110]}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"kernels-{options.bundle}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

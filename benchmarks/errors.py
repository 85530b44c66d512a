"""The largest relative error of every form on every architecture of the tests, as the export's own gate measures it.

python -m benchmarks.errors [--half] [--model NAME]     # from the repository's root
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from tests.helpers.exporters.architectures import MODELS, adapters_for
from tpeft_deploy import export_bundle


def errors(name: str, dtype: torch.dtype) -> dict[str, float]:
    module, inputs, shapes = MODELS[name]()
    adapters = adapters_for(module)
    module = module.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "bundle"
        bundle = export_bundle(module, adapters, path, example_inputs=inputs, dynamic_shapes=shapes, folded=True)
        for check in bundle.manifest.gate:
            worst[check["form"]] = max(worst.get(check["form"], 0.0), check["error"])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--half", action="store_true", help="In float16.")
    parser.add_argument("--model", choices=sorted(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in [options.model] if options.model else MODELS:
        found = errors(name, torch.float16 if options.half else torch.float32)
        print(f"{name:28}" + "  ".join(f"{form} {error:.1e}" for form, error in found.items()), flush=True)


if __name__ == "__main__":
    main()

"""What ONNX Runtime's fused SkipLayerNormalization costs on the CPU, over the Add and LayerNormalization it replaces.

    python -m benchmarks.fusions [--rounds N] [--json]

One residual sum and norm, float32, in two sessions that take turns: as ONNX Runtime opens it by default, and with
the fusion disabled as `runtime/sessions/providers.py` does.  Ratios of medians.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import numpy as np
import onnx
import onnxruntime
from onnx import helper

FUSION = "SkipLayerNormFusion"
SHAPES = [(1, 16), (16, 8), (8, 128)]
WIDTHS = [384, 768, 1024]


def residual_norm(width: int) -> bytes:
    """A model of Add and LayerNormalization on [batch, tokens, width]."""
    float32 = onnx.TensorProto.FLOAT
    ports = [helper.make_tensor_value_info(name, float32, ["batch", "tokens", width]) for name in ("x", "y", "out")]
    weights = [helper.make_tensor(name, float32, [width], np.ones(width, np.float32)) for name in ("scale", "bias")]
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["out"]),
    ]
    graph = helper.make_graph(nodes, "residual_norm", ports[:2], ports[2:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def session(model: bytes, threads: int, *, fused: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    disabled = [] if fused else [FUSION]
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def fused_over_apart(width: int, shape: tuple[int, int], threads: int, rounds: int) -> float:
    array = np.random.default_rng(0).standard_normal((*shape, width)).astype(np.float32)
    model = residual_norm(width)
    sessions = [session(model, threads, fused=fused) for fused in (True, False)]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for times, one in zip(seconds, sessions, strict=True):
            began = time.perf_counter()
            one.run(None, {"x": array, "y": array})
            times.append(time.perf_counter() - began)
    return median(seconds[0]) / median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {
        f"{threads} threads, [{shape[0]}, {shape[1]}, {width}]": fused_over_apart(width, shape, threads, options.rounds)
        for threads in (1, 2)
        for width in WIDTHS
        for shape in SHAPES
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for case, ratio in found.items():
        print(f"{case:30} {ratio:6.2f}")


if __name__ == "__main__":
    main()

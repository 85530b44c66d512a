"""What a depthwise conv costs when its weight change is fed at run time, in several ways of writing it in ONNX.

    python benchmarks/depthwise.py [--rows B] [--repeats N] [--json]

Every form is first compared with a conv in float64.  Costs are processor time over that of the base conv with a
constant weight, forms taking turns, two threads that do not spin.  The forms:

| form | what the graph holds |
|---|---|
| base | Conv with the constant weight W: ONNX Runtime's CPU takes its channel-blocked kernel |
| weight | Conv with W + up core, which is no constant: im2col and one matrix product of one row per channel |
| dense | Conv with a fed W + dW: what of `weight` is the conv's own |
| branch | base plus a Conv with a fed dW |
| spatial | base plus a Conv of all channels, seen as images of one channel, with the core, then a product with up |
| strip | bands of T rows as full-width convs with Toeplitz weights (C T, 1, K, T + K - 1): products without im2col |
| blocked | W + up core through ReorderInput into ONNX Runtime's own blocked Conv, of whatever block the CPU has |
| weight rows, blocked rows | the same in a Scan over rows, each with its own weight |

`blocked` takes channels that are a multiple of 16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
KERNEL, RANK, TOLERANCE = 7, 8, 1e-5
PAD = KERNEL // 2
SIZES = ((96, 56), (192, 28), (384, 14), (768, 7))  # channels, height = width: the stages of ConvNeXt-tiny
STRIPS = {56: 14, 28: 14, 14: 7, 7: 7}  # rows of a band by height, the best of those that divide it
BLOCKS = "com.microsoft.nchwc"


@dataclass(frozen=True)
class Form:
    """A graph's nodes in ONNX's text syntax, the tensors that are fed beside x, and those that are constants."""

    nodes: str
    fed: Mapping[str, Array]
    constants: Mapping[str, Array] = field(default_factory=dict)


def tensor_type(array: Array) -> str:
    return f"{'float' if array.dtype == np.float32 else 'int64'}[{','.join(map(str, array.shape))}]"


def session(form: Form, x: Array) -> onnxruntime.InferenceSession:
    inputs = ", ".join(f"{tensor_type(array)} {name}" for name, array in {"x": x, **form.fed}.items())
    text = f'<ir_version: 9, opset_import: ["": 20, "{BLOCKS}": 1]> g ({inputs}) => (float[B,C,H,W] y) {{{form.nodes}}}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in form.constants.items())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def forms(x: Array, w: Array, up: Array, core: Array) -> dict[str, Form]:
    """The forms for one adapter; `w` (C, 1, K, K), `up` (C, R), `core` (R, K K)."""
    rows, channels, height, width = x.shape
    change = (up @ core).reshape(w.shape)
    conv = f"<group: int = {channels}, pads: ints = [{PAD},{PAD},{PAD},{PAD}]>"
    blocked = f"<channels: int = {channels}>"
    whole = "d = MatMul(up, core) dw = Reshape(d, shape) v = Add(w, dw)"
    factors = {"up": up, "core": core}
    kernels = core.reshape(-1, 1, KERNEL, KERNEL)
    images = {"single": ints(-1, 1, height, width), "flat": ints(rows, channels, RANK, -1), "full": ints(*x.shape)}
    spatial = (
        f"p = Conv{conv}(x, w) i = Reshape(x, single) j = Conv<pads: ints = [{PAD},{PAD},{PAD},{PAD}]>(i, kernels)"
        "k = Reshape(j, flat) l = MatMul(row, k) m = Reshape(l, full) y = Add(p, m)"
    )
    return {
        "base": Form(f"y = Conv{conv}(x, w)", {}, {"w": w + change}),
        "weight": Form(f"{whole} y = Conv{conv}(x, v)", factors, {"w": w, "shape": ints(*w.shape)}),
        "dense": Form(f"y = Conv{conv}(x, v)", {"v": w + change}),
        "branch": Form(f"p = Conv{conv}(x, w) q = Conv{conv}(x, dw) y = Add(p, q)", {"dw": change}, {"w": w}),
        "spatial": Form(spatial, {"kernels": kernels, "row": up[:, None]}, {"w": w, **images}),
        "strip": strip(x, w + change),
        "blocked": Form(
            f"{whole} p = Transpose<perm: ints = [1,0,2,3]>(v) q = {BLOCKS}.ReorderInput(p) r = Reshape(q, shape)"
            f"i = {BLOCKS}.ReorderInput(x) j = {BLOCKS}.Conv{conv}(i, r) y = {BLOCKS}.ReorderOutput{blocked}(j)",
            factors,
            {"w": w, "shape": ints(*w.shape)},
        ),
    } | row_forms(x, w, up, core, conv)


def row_forms(x: Array, w: Array, up: Array, core: Array, conv: str) -> dict[str, Form]:
    """The forms in which every row has its own weight; here all rows are given the same one."""
    channels = x.shape[1]
    banks = {"ups": np.stack([up] * len(x)), "cores": np.stack([core] * len(x))}
    constants = {"w": w, "shape": ints(-1, *w.shape), "planes": ints(-1, channels, KERNEL, KERNEL)}
    constants |= {"split": ints(-1, 1, *x.shape[1:]), "join": ints(*x.shape)}
    whole = "d = MatMul(ups, cores) dw = Reshape(d, shape) v = Add(w, dw)"
    body = "row (float[1,C,H,W] a, float[C,1,K,L] b) => (float[1,C,H,W] c)"
    scan = f"s = Scan<num_scan_inputs: int = 2, body: graph = {body} {{{{c = {{}}Conv{conv}(a, b)}}}}>"
    return {
        "weight rows": Form(
            f"{whole} t = Reshape(x, split) {scan.format('')}(t, v) y = Reshape(s, join)", banks, constants
        ),
        "blocked rows": Form(
            f"{whole} p = Reshape(v, planes) q = {BLOCKS}.ReorderInput(p) r = Reshape(q, shape)"
            f"i = {BLOCKS}.ReorderInput(x) t = Reshape(i, split) {scan.format(BLOCKS + '.')}(t, r)"
            f"u = Reshape(s, join) y = {BLOCKS}.ReorderOutput<channels: int = {channels}>(u)",
            banks,
            constants,
        ),
    }


def strip(x: Array, weight: Array) -> Form:
    """Bands of T rows; the image stands on its side, so that the product's rows come out as the image's rows."""
    rows, channels, height, width = x.shape
    tall = STRIPS[height]
    count, reach = height // tall, tall + KERNEL - 1
    toeplitz = np.zeros((channels, tall, KERNEL, reach), np.float32)
    for t in range(tall):
        toeplitz[:, t, :, t : t + KERNEL] = weight[:, 0].transpose(0, 2, 1)
    cuts = "".join(f"c{i} = Slice(p, f{i}, t{i}, axis)" for i in range(count))
    pads = {"pads": ints(0, 0, PAD, PAD, 0, 0, PAD, PAD), "axis": ints(3)}
    ends = pads | {f"{e}{i}": ints(i * tall + (reach if e == "t" else 0)) for i in range(count) for e in "ft"}
    return Form(
        f"s = Transpose<perm: ints = [0,1,3,2]>(x) p = Pad(s, pads) {cuts}"
        f"b = Concat<axis: int = 0>({','.join(f'c{i}' for i in range(count))})"
        f"z = Conv<group: int = {channels}>(b, toeplitz) i = Reshape(z, bands)"
        "j = Transpose<perm: ints = [1,2,0,3,4]>(i) y = Reshape(j, full)",
        {"toeplitz": toeplitz.reshape(channels * tall, 1, KERNEL, reach)},
        ends | {"bands": ints(count, rows, channels, tall, width), "full": ints(*x.shape)},
    )


def processor_times(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time per call, the calls taking turns."""
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            runs[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in runs.items()}


def measure(channels: int, size: int, rows: int, repeats: int) -> dict[str, float]:
    """Form -> processor time in milliseconds, after comparing each with float64."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape, np.float32)

    x, w = normal(rows, channels, size, size), normal(channels, 1, KERNEL, KERNEL) / KERNEL
    up, core = normal(channels, RANK) / RANK, normal(RANK, KERNEL * KERNEL)
    change = (up.astype(np.float64) @ core.astype(np.float64)).reshape(w.shape)
    images, weight = torch.from_numpy(x).double(), torch.from_numpy(w + change)
    expected = torch.nn.functional.conv2d(images, weight, padding=PAD, groups=channels).numpy()
    calls: dict[str, Callable[[], object]] = {}
    for name, form in forms(x, w, up, core).items():
        opened, feeds = session(form, x), {"x": x, **form.fed}
        error = np.linalg.norm(opened.run(None, feeds)[0] - expected) / np.linalg.norm(expected)
        if not error < TOLERANCE:
            raise SystemExit(f"form {name!r} at {channels} x {size} x {size} is wrong: relative error {error:.1e}")
        calls[name] = lambda opened=opened, feeds=feeds: opened.run(None, feeds)  # type: ignore[misc]
    return processor_times(calls, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {f"{c}x{size}x{size}": measure(c, size, options.rows, options.repeats) for c, size in SIZES}
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'x base':14}" + "".join(f"{size:>12}" for size in found))
    for name in next(iter(found.values())):
        print(f"{name:14}" + "".join(f"{times[name] / times['base']:12.2f}" for times in found.values()))
    print(f"{'base, ms':14}" + "".join(f"{times['base']:12.2f}" for times in found.values()))


if __name__ == "__main__":
    main()

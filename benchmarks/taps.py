"""What adds the taps of a banked conv soonest: a conv with a one-hot window, Col2Im, or W + dW in place of the branch.

    python -m benchmarks.taps

Single operators in ONNX Runtime with one thread, on the CPU; medians of 31, operators in turns.  Window and Col2Im were
found to give the same before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tpeft_deploy.runtime.bench.measure import Case, interleave, spread
from tpeft_deploy.tucker import Array

PLANES = ((128, 32), (128, 16), (8, 32))  # planes of nine taps, and pixels of a side
CONVS = ((64, 32, 16), (64, 16, 16), (64, 32, 1))  # channels, pixels of a side, rows
KERNEL, TAPS, RANK, SECONDS = 3, 9, 8, 3.0


def running(node: NodeProto, inputs: Mapping[str, Array], constants: Mapping[str, Array]) -> Case:
    """A session of one operator, on its inputs."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(own.shape)) for name, own in inputs.items()]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "one", ports, [output], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(inputs))[0]


def conv(inputs: Mapping[str, Array], constants: Mapping[str, Array], groups: int = 1) -> Case:
    return running(helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, group=groups), inputs, constants)


def sums(planes: int, side: int) -> dict[str, Case]:
    """Ways to add nine taps of so many planes."""
    taps = np.random.default_rng(0).standard_normal((planes, TAPS, side, side)).astype(np.float32)
    window = np.eye(TAPS, dtype=np.float32).reshape(1, TAPS, KERNEL, KERNEL)
    columns = np.ascontiguousarray(taps[:, ::-1].reshape(planes, TAPS, -1))
    sizes = {"image": np.array([side, side]), "block": np.array([KERNEL, KERNEL])}
    node = helper.make_node("Col2Im", ["x", "image", "block"], ["y"], pads=[1] * 4)
    cases = {"window": conv({"x": taps}, {"w": window}), "Col2Im": running(node, {"x": columns}, sizes)}
    one, other = (np.asarray(case()) for case in cases.values())
    if not np.allclose(one, other, atol=1e-4):
        raise SystemExit("compare the sums of taps: expected equal ones, got others")
    return cases


def whole(channels: int, side: int, rows: int) -> dict[str, Case]:
    """A conv of the base, one with a weight for each row, and the products of those weights."""
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, channels, side, side)).astype(np.float32)
    weight = random.standard_normal((channels, channels, KERNEL, KERNEL)).astype(np.float32)
    up = random.standard_normal((rows, channels, RANK)).astype(np.float32)
    core = random.standard_normal((rows, RANK, channels * TAPS)).astype(np.float32)
    each = {"x": x.reshape(1, rows * channels, side, side), "w": np.concatenate([weight] * rows)}
    return {
        "base": conv({"x": x}, {"w": weight}),
        "a weight for each row": conv(each, {}, rows),
        "dW": running(helper.make_node("MatMul", ["up", "core"], ["y"]), {"up": up, "core": core}, {}),
    }


def show(title: str, cases: Mapping[str, Case]) -> None:
    times = interleave(cases, SECONDS)
    print(title, ", ".join(f"{name} {1e3 * spread(own).median:.2f} ms" for name, own in times.items()))


def main() -> None:
    for planes, side in PLANES:
        show(f"{planes} planes of {side} x {side}:", sums(planes, side))
    for channels, side, rows in CONVS:
        show(f"conv of {channels} channels, {rows} rows of {side} x {side}:", whole(channels, side, rows))


if __name__ == "__main__":
    main()

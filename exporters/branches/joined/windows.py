"""Windows in place of Col2Im, which ONNX Runtime has for the CPU only."""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches import conv
from tpeft_deploy.exporters.branches.surgery import call, route_around

__all__ = ["replace_col2im"]

_FUNCTION = "Col2Im"


def replace_col2im(model: ir.Model) -> bool:
    """Let a conv with a one-hot window add the taps of branches, in place.

    Returns:
        True if the graph had such a branch.
    """
    found = [node for node in model.graph if node.op_type == f"BankedConvUp{_FUNCTION}"]
    for node in found:
        y, cores = node.outputs[0], node.inputs[3]
        kernel = [int(size) for size in list(cores.shape)[3:]]  # type: ignore[union-attr, arg-type]
        dilations = list(node.attributes.get_ints("dilations"))
        attributes = {
            "strides": [1] * len(kernel),
            "pads": conv.mirrored_pads(kernel, dilations, node.attributes.get_ints("pads")),
            "dilations": dilations,
        }
        window = conv.window(model, kernel, y.dtype or ir.DataType.FLOAT, sums=True)
        inputs = [*(value for value in node.inputs if value is not None), window]
        function = node.op_type.removesuffix(_FUNCTION)
        new = call(model, function, inputs, name=f"{node.name}.window", like=y, after=node, attributes=attributes)
        route_around(node, new)
    return bool(found)

"""Metadata and configuration of a model in the V2 protocol, from the bundle's manifest."""

from __future__ import annotations

from collections.abc import Sequence

from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import Unsupported
from tpeft_deploy.runtime.server.v2.messages import Document

__all__ = ["ADAPTER_INPUT", "DATATYPES", "PLATFORM", "config", "datatype", "metadata"]

ADAPTER_INPUT = "adapter"
PLATFORM = "onnxruntime_onnx"

# NumPy dtype -> V2 datatype; ModelConfig adds the prefix TYPE_ (and has STRING for BYTES).
DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
}


def datatype(port: Port) -> str:
    """Return the V2 datatype of an input or output.

    Raises:
        Unsupported: the protocol has no such datatype.
    """
    if port.dtype not in DATATYPES:
        raise Unsupported(
            f"serve {port.name!r}", expected=f"one of {', '.join(DATATYPES)} as its dtype", got=repr(port.dtype)
        )
    return DATATYPES[port.dtype]


def metadata(manifest: Manifest, name: str, versions: Sequence[str], *, mixed: bool = False) -> Document:
    """Return the metadata of a model; dynamic sizes are -1.

    Args:
        manifest: manifest of the bundle.
        name: name of the model.
        versions: available versions.
        mixed: whether the model takes a task per row in the extra input `adapter`.
    """
    inputs = [_tensor(port) for port in manifest.inputs]
    if mixed:
        inputs.append({"name": ADAPTER_INPUT, "datatype": "BYTES", "shape": [-1]})
    return {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": [_tensor(port) for port in manifest.outputs],
    }


def config(
    manifest: Manifest,
    name: str,
    versions: Sequence[str],
    *,
    max_rows: int,
    max_delay: float,
    mixed: bool = False,
    decoupled: bool = False,
) -> Document:
    """Return the configuration of a model in the fields of Triton's ModelConfig.

    Args:
        manifest: manifest of the bundle.
        name: name of the model.
        versions: available versions.
        max_rows: maximum batch size; if the model has a batch axis, sizes omit it.
        max_delay: maximum queue delay of dynamic batching in seconds.
        mixed: whether the model takes a task per row in the extra input `adapter`.
        decoupled: whether a request of a stream may have several answers, as one for text has.
    """
    # The mixed model's input `adapter` has one element or one per row, so its sizes include the batch.
    ports = (*manifest.inputs, *manifest.outputs)
    batch = manifest.batch_axis
    batched = not mixed and batch is not None and all(port.shape and port.shape[0] == batch for port in ports)
    document: Document = {
        "name": name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [int(version) for version in versions]}},
        "max_batch_size": max_rows if batched else 0,
        "input": [_configured(port, batched) for port in manifest.inputs],
        "output": [_configured(port, batched) for port in manifest.outputs],
        "model_transaction_policy": {"decoupled": decoupled},
    }
    if mixed:
        document["input"].append({"name": ADAPTER_INPUT, "data_type": "TYPE_STRING", "dims": [-1]})
    if batched:
        document["dynamic_batching"] = {"max_queue_delay_microseconds": round(1e6 * max_delay)}
    return document


def _tensor(port: Port) -> Document:
    return {"name": port.name, "datatype": datatype(port), "shape": _sizes(port)}


def _configured(port: Port, batched: bool) -> Document:
    sizes = _sizes(port)
    return {"name": port.name, "data_type": f"TYPE_{datatype(port)}", "dims": sizes[1:] if batched else sizes}


def _sizes(port: Port) -> list[int]:
    sizes = [size if isinstance(size, int) else -1 for size in port.shape]
    if port.varies is not None:
        sizes[port.varies.axis] = -1
    return sizes

"""Inference over V2 REST with the binary tensor extension: encodes requests and decodes responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tpeft_deploy.client.answers import HEADER_LENGTH, Answer, Document, document
from tpeft_deploy.client.body import RequestBody
from tpeft_deploy.client.exchange import Payload, ServerCall
from tpeft_deploy.client.tensors import Tensor, decode, encode, from_json, may_be_bfloat16
from tpeft_deploy.client.url import affinity, model_path
from tpeft_deploy.errors import InputError, ServerError
from tpeft_deploy.tucker import Array

__all__ = ["BundleInfo", "InferArguments", "Outputs", "bundle_info", "bundle_name", "infer"]

Outputs = dict[str, Array | list[Array]]

_ADAPTER = "adapter"


@dataclass(frozen=True)
class BundleInfo:
    """Facts about a server's bundle that requests depend on.

    Attributes:
        name: name of the bundle: the model that takes one task per row.
        bfloat16: names of the bfloat16 inputs; numpy has no such dtype.
        outputs: names of the outputs.
    """

    name: str
    bfloat16: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True)
class InferArguments:
    """Arguments of `Client.infer`.

    Attributes:
        inputs: input name -> array.
        task: task of all rows, or None.
        tasks: one task per row, or None.
        outputs: names of the outputs to return; None: all.
        priority: priority among the tenant's requests; lower values are served first.
        component: component to run, or None.
    """

    inputs: Mapping[str, object]
    task: str | None
    tasks: Sequence[str] | None
    outputs: Sequence[str] | None
    priority: int
    component: str | None = None

    def __post_init__(self) -> None:
        if self.tasks is None:
            return
        if self.task is not None:
            raise InputError("run a request", expected="task or tasks", got="both")
        if isinstance(self.tasks, str):
            raise InputError(
                "run a request", expected="tasks as a list with one task per row", got=f"the string {self.tasks!r}"
            )
        if _ADAPTER in self.inputs:
            raise InputError("run a request", expected="tasks, or an input 'adapter'", got="both")

    @property
    def needs_bundle(self) -> bool:
        """Whether the request depends on facts about the bundle."""
        return self.tasks is not None or any(may_be_bfloat16(value) for value in self.inputs.values())

    @property
    def component_of_bundle(self) -> str:
        """Component that the facts are about; empty if none is named."""
        return self.component or (self.task or "").partition("@")[0].partition("/")[2]


def bundle_name() -> ServerCall[str]:
    """Ask for the bundle's name."""
    return ServerCall("ask for the bundle's name", "GET", "/v2", _bundle_name)


def bundle_info(name: str, component: str = "") -> ServerCall[BundleInfo]:
    """Ask for the inputs and outputs of the bundle, or of a component of it."""
    path = model_path(f"{name}/{component}" if component else name)
    return ServerCall(f"ask about bundle {name!r}", "GET", path, partial(_bundle_info, name))


def infer(arguments: InferArguments, bundle: BundleInfo | None) -> ServerCall[Outputs]:
    """Encode a request for inference.

    Args:
        arguments: arguments of the user's call.
        bundle: facts about the bundle, where the arguments need them.
    """
    bfloat16 = bundle.bfloat16 if bundle else frozenset[str]()
    tensors = [encode(name, value, bfloat16=name in bfloat16) for name, value in arguments.inputs.items()]
    rows = None
    if arguments.tasks is not None and bundle is not None:
        model, rows = bundle.name, len(arguments.tasks)
        doing = f"run {rows} rows with one task each"
        tensors.append(encode(_ADAPTER, np.array(list(arguments.tasks), dtype=object)))
    else:
        model = "base" if arguments.task is None else arguments.task
        doing = f"run task {model!r}"
    known = bundle.outputs if bundle else frozenset[str]()
    return ServerCall(
        doing,
        "POST",
        f"{model_path(model)}/infer",
        partial(_outputs, rows=rows, known=known),
        payload=partial(_payload, tensors, _head(arguments, tensors), arguments),
    )


def _head(arguments: InferArguments, tensors: Sequence[Tensor]) -> Document:
    head: Document = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "parameters": {"binary_data_size": len(tensor.data)},
            }
            for tensor in tensors
        ]
    }
    if arguments.outputs is not None:
        head["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in arguments.outputs]
    return head


def _payload(tensors: Sequence[Tensor], head: Document, arguments: InferArguments, left: float | None) -> Payload:
    parameters: dict[str, bool | int | str] = {"binary_data_output": True}
    if left is not None:
        parameters["timeout"] = max(1, int(1e6 * left))  # microseconds
    if arguments.priority:
        parameters["priority"] = arguments.priority
    if arguments.component is not None:
        parameters["component"] = arguments.component
    first = json.dumps({"parameters": parameters, **head}, separators=(",", ":")).encode()
    headers = {HEADER_LENGTH: str(len(first)), "Content-Type": "application/octet-stream"}
    if arguments.tasks:
        headers |= affinity(arguments.tasks[0])
    return Payload(headers, RequestBody([first, *(tensor.data for tensor in tensors)]))


def _outputs(answer: Answer, *, rows: int | None, known: frozenset[str]) -> Outputs:
    length = answer.headers.get(HEADER_LENGTH)
    size = len(answer.body) if length is None else _size(length, len(answer.body), "the JSON of the answer")
    head = document(Answer(answer.status, answer.headers, answer.body[:size]))
    found: dict[str, Array] = {}
    at = size
    for stated in _listed(head):
        name, datatype, shape = _tensor(stated)
        binary = stated.get("parameters", {}).get("binary_data_size")
        if binary is None:
            found[name] = from_json(name, datatype, shape, stated.get("data"))
            continue
        count = _size(binary, len(answer.body) - at, f"output {name!r}")
        found[name] = decode(name, datatype, shape, answer.body[at : at + count])
        at += count
    if at != len(answer.body):
        raise ServerError("read the answer", expected=f"{at} bytes", got=f"{len(answer.body)} bytes")
    return {**found} if rows is None else _by_rows(found, rows, known)


def _by_rows(found: Mapping[str, Array], rows: int, known: frozenset[str]) -> Outputs:
    """Collect the rows of outputs that the server sends one by one because their sizes differ."""
    outputs: Outputs = {}
    for name, array in found.items():
        base, _, row = name.rpartition(".")
        if name in known or base not in known or not row.isdecimal():
            outputs[name] = array
        elif base not in outputs:
            try:
                outputs[base] = [found[f"{base}.{each}"] for each in range(rows)]
            except KeyError as error:
                raise ServerError(
                    f"read output {base!r}", expected=f"{rows} rows", got=f"an answer without {error}"
                ) from error
    return outputs


def _listed(head: Document) -> list[Document]:
    outputs = head.get("outputs")
    if not isinstance(outputs, list) or not all(
        isinstance(output, dict) and isinstance(output.get("parameters", {}), dict) for output in outputs
    ):
        raise ServerError("read the answer", expected="outputs, a list of objects", got=repr(outputs)[:120])
    return outputs


def _tensor(stated: Document) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape = stated.get("name"), stated.get("datatype"), stated.get("shape")
    if (
        not isinstance(name, str)
        or not isinstance(datatype, str)
        or not isinstance(shape, list)
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise ServerError("read the answer", expected="outputs with name, datatype and shape", got=repr(stated)[:120])
    return name, datatype, tuple(shape)


def _size(stated: Any, most: int, what: str) -> int:
    if type(stated) is str and stated.isascii() and stated.isdigit():
        stated = int(stated)
    if type(stated) is not int or not 0 <= stated <= most:
        raise ServerError(f"read {what}", expected=f"a size of 0 to {most} bytes", got=repr(stated)[:40])
    return stated


def _bundle_name(answer: Answer) -> str:
    name = document(answer).get("bundle")
    if not isinstance(name, str):
        raise ServerError(
            "ask for the bundle's name", expected="a server of tpeft_deploy, which says it", got="one that does not"
        )
    return name


def _bundle_info(name: str, answer: Answer) -> BundleInfo:
    metadata = document(answer)
    try:
        bfloat16 = frozenset(port["name"] for port in metadata["inputs"] if port["datatype"] == "BF16")
        return BundleInfo(name, bfloat16, frozenset(port["name"] for port in metadata["outputs"]))
    except (KeyError, TypeError) as error:
        raise ServerError(
            f"ask about bundle {name!r}", expected="its inputs and outputs", got=repr(metadata)[:120]
        ) from error

"""Inference over V2 REST with the binary tensor extension: requests to bytes, bytes to outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tpeft_deploy.client.answers import HEADER_LENGTH, Answer, Document, document
from tpeft_deploy.client.body import Body
from tpeft_deploy.client.exchange import Call, Payload
from tpeft_deploy.client.names import model_path
from tpeft_deploy.client.tensors import Tensor, decode, encode, from_json, may_be_bfloat16
from tpeft_deploy.errors import InputError, ServerError
from tpeft_deploy.tucker import Array

__all__ = ["Facts", "Outputs", "Wish", "facts_of", "infer", "name_of"]

Outputs = dict[str, Array | list[Array]]

_ADAPTER = "adapter"


@dataclass(frozen=True)
class Facts:
    """What a server's bundle is, as far as requests depend on it.

    Attributes:
        bundle: its name, under which rows have tasks of their own.
        bfloat16: inputs that are bfloat16, which numpy has not.
        outputs: names of the model's outputs.
    """

    bundle: str
    bfloat16: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        inputs: input name -> array.
        task: for all rows, or None.
        tasks: one a row, or None.
        outputs: names; None: all.
        priority: smaller is sooner.
    """

    inputs: Mapping[str, object]
    task: str | None
    tasks: Sequence[str] | None
    outputs: Sequence[str] | None
    priority: int

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
    def needs_facts(self) -> bool:
        """Whether the server has to be asked about its bundle first."""
        return self.tasks is not None or any(may_be_bfloat16(value) for value in self.inputs.values())


def name_of() -> Call[str]:
    """Asks for the bundle's name."""
    return Call("ask for the bundle's name", "GET", "/v2", _bundle)


def facts_of(name: str) -> Call[Facts]:
    """Asks what the bundle is."""
    return Call(f"ask about bundle {name!r}", "GET", model_path(name), partial(_facts, name))


def infer(wish: Wish, facts: Facts | None) -> Call[Outputs]:
    """A request for inference.

    Args:
        wish: what the user asks for.
        facts: about the bundle, where the wish needs them.
    """
    bfloat16 = facts.bfloat16 if facts else frozenset[str]()
    tensors = [encode(name, value, bfloat16=name in bfloat16) for name, value in wish.inputs.items()]
    rows = None
    if wish.tasks is not None and facts is not None:
        model, doing, rows = facts.bundle, f"run {len(wish.tasks)} rows with tasks of their own", len(wish.tasks)
        tensors.append(encode(_ADAPTER, np.array(list(wish.tasks), dtype=object)))
    else:
        model = "base" if wish.task is None else wish.task
        doing = f"run task {model!r}"
    known = facts.outputs if facts else frozenset[str]()
    return Call(
        doing,
        "POST",
        f"{model_path(model)}/infer",
        partial(_outputs, rows=rows, known=known),
        payload=partial(_payload, tensors, _head(wish, tensors), wish.priority),
    )


def _head(wish: Wish, tensors: Sequence[Tensor]) -> Document:
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
    if wish.outputs is not None:
        head["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in wish.outputs]
    return head


def _payload(tensors: Sequence[Tensor], head: Document, priority: int, left: float | None) -> Payload:
    parameters: dict[str, bool | int] = {"binary_data_output": True}
    if left is not None:
        parameters["timeout"] = max(1, int(1e6 * left))  # microseconds
    if priority:
        parameters["priority"] = priority
    first = json.dumps({"parameters": parameters, **head}, separators=(",", ":")).encode()
    headers = {HEADER_LENGTH: str(len(first)), "Content-Type": "application/octet-stream"}
    return Payload(headers, Body([first, *(tensor.data for tensor in tensors)]))


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
    """The rows of an output that the server had to name one by one, as they differ in size, together again."""
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


def _bundle(answer: Answer) -> str:
    name = document(answer).get("bundle")
    if not isinstance(name, str):
        raise ServerError(
            "ask for the bundle's name", expected="a server of tpeft_deploy, which says it", got="one that does not"
        )
    return name


def _facts(name: str, answer: Answer) -> Facts:
    metadata = document(answer)
    try:
        bfloat16 = frozenset(port["name"] for port in metadata["inputs"] if port["datatype"] == "BF16")
        return Facts(name, bfloat16, frozenset(port["name"] for port in metadata["outputs"]))
    except (KeyError, TypeError) as error:
        raise ServerError(
            f"ask about bundle {name!r}", expected="its inputs and outputs", got=repr(metadata)[:120]
        ) from error

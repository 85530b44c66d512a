"""Uses of initializers in a foreign graph, and the consumers' evidence for the module that they belong to."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["QUANTISED", "Use", "class_names", "modules_of", "renaming", "uses_of"]

QUANTISED = {
    "DequantizeLinear",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulInteger",
    "MatMulNBits",
}
_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"
_REPEATED = re.compile(r"_\d+$")


@dataclass(frozen=True, eq=False)
class Use:
    """One consumer of an initializer.

    Args:
        value: the initializer.
        node: its consumer.
        index: which input of the consumer it is.
        claims: kind of evidence -> path of the module that the consumer belongs to.
    """

    value: ir.Value
    node: ir.Node
    index: int
    claims: dict[str, str]

    @property
    def turnable(self) -> bool:
        """Whether the weight may stand here transposed: an exporter writes x W^T as a product with what W^T is."""
        return self.index == 1 and self.node.op_type in {"MatMul", "Gemm"} and len(self.value.shape or ()) == 2

    @property
    def is_kernel(self) -> bool:
        """Whether a norm behind the consumer may have been folded into the weight."""
        return self.index == 1 and self.node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def uses_of(graph: ir.Graph) -> Iterator[Use]:
    """Every use of every floating point initializer."""
    for value in graph.initializers.values():
        if value.const_value is None or not value.const_value.dtype.is_floating_point():
            continue
        for node, index in value.uses():
            yield Use(value, node, index, dict(modules_of(node)))


def modules_of(node: ir.Node) -> Iterator[tuple[str, str]]:
    """Evidence for a node's module, and the module's dotted path; nothing where an exporter left no trace."""
    scopes = _strings(node, _SCOPES)
    if len(scopes) >= 2 and scopes[0] == "":
        yield "the exporter's metadata", scopes[-2]
    if node.name and node.name.startswith("/"):
        yield "the node's path", node.name.strip("/").rpartition("/")[0].replace("/", ".")


def class_names(graph: ir.Graph) -> dict[str, str]:
    """Module path -> class name of the layer, as far as the exporter recorded it."""
    found: dict[str, str] = {}
    for node in graph:
        pairs = zip(_strings(node, _SCOPES)[:-1], _strings(node, _CLASSES)[:-1], strict=False)
        found |= {path: kind.rpartition(".")[2] for path, kind in pairs if path}
    return found


def renaming(paths: Iterable[str], places: frozenset[str]) -> Callable[[str], str]:
    """Find the way from names of the file to names of the base, which may have or lack a wrapper's prefix.

    Args:
        paths: names of initializers and modules in the file.
        places: names of weights and modules of the base.

    Returns:
        A function that renames one; the simplest of those under which most names are found.
    """
    paths = {plain for path in paths for plain in (path, unrepeated(path))}
    heads = {"", *(head for path in paths for head in _heads(path))}
    tails = {"", *(head for place in places for head in _heads(place))}
    scored = [(_score(paths, head, "", places), len(head), head, "") for head in heads]
    scored += [(_score(paths, "", tail, places), len(tail), "", tail) for tail in tails]
    _, _, head, tail = min(scored)

    def rename(path: str) -> str:
        if not path:
            return tail.rstrip(".")
        for name in (path, unrepeated(path)):
            short = name.removeprefix(head) if name.startswith(head) else name
            if f"{tail}{short}" in places:
                return f"{tail}{short}"
        # A wrapper that only calls the model is its root.
        return "" if f"{path}." == head else f"{tail}{path.removeprefix(head)}"

    return rename


def _score(paths: Iterable[str], head: str, tail: str, places: frozenset[str]) -> int:
    return -sum(f"{tail}{path.removeprefix(head)}" in places for path in paths if path.startswith(head))


def unrepeated(path: str) -> str:
    """A module's path without the numbers that mark its second and later calls."""
    return ".".join(_REPEATED.sub("", part) for part in path.split("."))


def _heads(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) + "." for count in (1, 2) if len(parts) > count]


def _strings(node: ir.Node, key: str) -> list[str]:
    text = node.metadata_props.get(key)
    if text is None:
        return []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []  # another tool's text under this key says nothing
    return [str(entry) for entry in found] if isinstance(found, list) else []

"""Reading and editing an ONNX file without the onnx package: just enough of protobuf's wire format.

ONNX Runtime takes other values for external initializers, but none of another shape than the file declares.  So a
head with another number of classes is declared in the file's bytes first; weights are not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Declared", "declared", "hidden", "resized", "shown", "without_is_nan"]

# Field numbers of onnx.proto.
_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _OPERATOR = 1, 2, 4
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _LOCATION = 1, 2, 8, 13, 14
_PORT_NAME, _TYPE, _TENSOR_TYPE, _ELEMENT, _SHAPE = 1, 2, 1, 1, 2
_DIM, _DIM_VALUE, _DIM_PARAM = 1, 1, 2


@dataclass(frozen=True)
class Declared:
    """What a file says of an initializer.

    Args:
        shape: its sizes.
        data_type: ONNX's number of its dtype.
        external: whether its bytes are in another file.
        location: name of that file.
        offset: place of the first byte in that file.
        length: number of bytes there.
    """

    shape: tuple[int, ...]
    data_type: int
    external: bool
    location: str = ""
    offset: int = 0
    length: int = 0


class _Field(NamedTuple):
    """A field of a message: its number, where its tag begins, and where its value lies."""

    number: int
    begin: int
    start: int
    end: int


_Edits = Mapping[int, Callable[[_Field], bytes] | None]


def declared(model: bytes) -> dict[str, Declared]:
    """The initializers of a model's main graph, by name.

    Args:
        model: the content of an ONNX file.
    """
    found = {}
    for graph in _fields(model, 0, len(model)):
        for field in _fields(model, graph.start, graph.end) if graph.number == _GRAPH else ():
            if field.number == _INITIALIZER:
                name, tensor = _tensor(model, field)
                found[name] = tensor
    return found


def resized(model: bytes, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A model with other shapes declared for some initializers, and none for what is computed from them.

    Args:
        model: the content of an ONNX file.
        shapes: initializer -> its new shape; its bytes must come from elsewhere.
    """
    return _edited(model, 0, len(model), {_GRAPH: lambda field: _graph(model, field, shapes)})


def hidden(model: bytes, shapes: Mapping[str, tuple[int | str, ...]]) -> bytes:
    """A model with its named initializers as plain inputs, so that no optimiser derives anything from their values.

    Args:
        model: the content of an ONNX file.
        shapes: initializer -> its shape as an input; a size that is a string is free.
    """
    found = declared(model)
    ports = [_message(_INPUT, _port(name, found[name].data_type, shape)) for name, shape in shapes.items()]

    def graph(field: _Field) -> bytes:
        kept = [model[f.begin : f.end] for f in _fields(model, field.start, field.end) if _stays(model, f, shapes)]
        whole = b"".join(kept)
        return _edited(whole, 0, len(whole), {_OUTPUT: _without_shape(whole), _VALUE_INFO: None}) + b"".join(ports)

    return _edited(model, 0, len(model), {_GRAPH: graph})


def shown(model: bytes, initializers: Mapping[str, Declared], file: str) -> bytes:
    """The inverse of `hidden`: external initializers in place of plain inputs.

    Args:
        model: the content of an ONNX file.
        initializers: input -> what to declare of it.
        file: the external file they are said to be in.
    """
    tensors = b"".join(_message(_INITIALIZER, _external(name, own, file)) for name, own in initializers.items())

    def graph(field: _Field) -> bytes:
        kept = [
            model[f.begin : f.end] for f in _fields(model, field.start, field.end) if _stays(model, f, initializers)
        ]
        return b"".join(kept) + tensors

    return _edited(model, 0, len(model), {_GRAPH: graph})


def without_is_nan(model: bytes) -> bytes:
    """A model with Not(Equal(x, x)) in place of each IsNaN(x) of its main graph; the same object if it has none.

    Args:
        model: the content of an ONNX file.
    """
    if b"IsNaN" not in model:
        return model

    def graph(field: _Field) -> bytes:
        fields = _fields(model, field.start, field.end)
        return b"".join(_compared(model, f) if f.number == _NODE else model[f.begin : f.end] for f in fields)

    return _edited(model, 0, len(model), {_GRAPH: graph})


def _compared(model: bytes, node: _Field) -> bytes:
    """A node, or the two that stand in place of an IsNaN."""
    held = {f.number: model[f.start : f.end] for f in _fields(model, node.start, node.end)}
    if held[_OPERATOR] != b"IsNaN":
        return model[node.begin : node.end]
    value, output = held[_NODE_INPUT], held[_NODE_OUTPUT]
    equal = output + b".tpeft.equal"
    return b"".join(
        _message(_NODE, inputs + _message(_NODE_OUTPUT, result) + _message(_OPERATOR, operator))
        for operator, inputs, result in (
            (b"Equal", 2 * _message(_NODE_INPUT, value), equal),
            (b"Not", _message(_NODE_INPUT, equal), output),
        )
    )


def _stays(model: bytes, field: _Field, names: Container[str]) -> bool:
    if field.number == _INITIALIZER:
        return _tensor(model, field)[0] not in names
    if field.number == _INPUT:
        own = next(f for f in _fields(model, field.start, field.end) if f.number == _PORT_NAME)
        return model[own.start : own.end].decode() not in names
    return True


def _port(name: str, data_type: int, shape: tuple[int | str, ...]) -> bytes:
    dims = b"".join(
        _message(_DIM, _message(_DIM_PARAM, s.encode()) if isinstance(s, str) else _number(_DIM_VALUE, s))
        for s in shape
    )
    tensor = _number(_ELEMENT, data_type) + _message(_SHAPE, dims)
    return _message(_PORT_NAME, name.encode()) + _message(_TYPE, _message(_TENSOR_TYPE, tensor))


def _external(name: str, own: Declared, file: str) -> bytes:
    place = _message(1, b"location") + _message(2, file.encode())
    dims = b"".join(_varint(size) for size in own.shape)
    return (
        _message(_DIMS, dims)
        + _number(_DATA_TYPE, own.data_type)
        + _message(_NAME, name.encode())
        + _message(_EXTERNAL_DATA, place)
        + _number(_LOCATION, 1)
    )


def _without_shape(model: bytes) -> Callable[[_Field], bytes]:
    """Rewrites a graph's output so that its shape is inferred again."""

    def output(field: _Field) -> bytes:
        return _edited(model, field.start, field.end, {_TYPE: port})

    def port(field: _Field) -> bytes:
        return _edited(model, field.start, field.end, {_TENSOR_TYPE: tensor_type})

    def tensor_type(field: _Field) -> bytes:
        return _edited(model, field.start, field.end, {_SHAPE: None})

    return output


def _graph(model: bytes, graph: _Field, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    def initializer(field: _Field) -> bytes:
        name, _ = _tensor(model, field)
        if name not in shapes:
            return model[field.start : field.end]
        dims = b"".join(_varint(size) for size in shapes[name])
        rest = _edited(model, field.start, field.end, {_DIMS: None})
        return _message(_DIMS, dims) + rest

    edits: _Edits = {_INITIALIZER: initializer, _OUTPUT: _without_shape(model), _VALUE_INFO: None}
    return _edited(model, graph.start, graph.end, edits)


def _tensor(model: bytes, tensor: _Field) -> tuple[str, Declared]:
    name, shape, data_type, external = "", [], 0, False
    place_of: dict[str, str] = {}
    for field in _fields(model, tensor.start, tensor.end):
        if field.number == _NAME:
            name = model[field.start : field.end].decode()
        elif field.number == _DIMS:
            place = field.start
            while place < field.end:
                size, place = _read_varint(model, place)
                shape.append(size)
        elif field.number == _DATA_TYPE:
            data_type, _ = _read_varint(model, field.start)
        elif field.number == _LOCATION:
            external = _read_varint(model, field.start)[0] == 1
        elif field.number == _EXTERNAL_DATA:
            key, value = (model[f.start : f.end].decode() for f in _fields(model, field.start, field.end))
            place_of[key] = value
    own = (place_of.get("location", ""), int(place_of.get("offset", 0)), int(place_of.get("length", 0)))
    return name, Declared(tuple(shape), data_type, external, *own)


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message between two places."""
    while start < end:
        begin = start
        tag, start = _read_varint(data, start)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, stop = _read_varint(data, start)
        elif wire == 2:
            length, start = _read_varint(data, start)
            stop = start + length
        elif wire in (1, 5):
            stop = start + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"protobuf wire type {wire} at byte {begin}")
        if stop > end:
            raise ValueError(f"a protobuf field at byte {begin} ends beyond its message")
        yield _Field(number, begin, start, stop)
        start = stop


def _edited(data: bytes, start: int, end: int, edits: _Edits) -> bytes:
    """A message with some fields rewritten, or left out where their edit is None."""
    parts, kept = [], start
    for field in _fields(data, start, end):
        if field.number in edits:
            parts.append(data[kept : field.begin])
            kept = field.end
            edit = edits[field.number]
            if edit is not None:
                parts.append(_message(field.number, edit(field)))
    return b"".join([*parts, data[kept:end]])


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """A number, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7

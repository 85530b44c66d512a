"""Checking what a caller sends before anything runs, and cutting what comes back: pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import InputError
from tpeft_deploy.tucker import Array

__all__ = [
    "Gathered",
    "as_rows",
    "batched",
    "check_apart",
    "check_inputs",
    "check_outputs",
    "check_tasks",
    "cut",
    "cut_rows",
    "rows",
    "take_rows",
]


def check_inputs(manifest: Manifest, inputs: Mapping[str, object]) -> dict[str, Array]:
    """The inputs as contiguous, aligned arrays, once names, dtypes and shapes fit the model.

    Raises:
        InputError: naming the input, what was expected and what came.
    """
    sizes: dict[str, tuple[int, str]] = {}
    arrays = {}
    for port in manifest.inputs:
        value = inputs.get(port.name)
        if value is None and port.name not in inputs:
            raise _other_names(manifest, inputs)
        array = value if isinstance(value, np.ndarray) else _as_array(manifest, port, value)
        _check_port(manifest, port, array, sizes)
        flags = array.flags
        if not (flags.c_contiguous and flags.aligned):
            # not ascontiguousarray, which gives a scalar an axis and leaves a cut of a network buffer unaligned
            array = array.copy(order="C")
        arrays[port.name] = array
    if len(arrays) != len(inputs):
        raise _other_names(manifest, inputs)
    if manifest.decoder is not None:
        _check_decoder(manifest, manifest.decoder, arrays)
    return arrays


def check_tasks(manifest: Manifest, tasks: Sequence[object], inputs: Mapping[str, Array]) -> None:
    """Refuse a list of tasks that does not name one task per row.

    Raises:
        InputError: another number of tasks than rows, no rows at all, or a string instead of a list.
    """
    if isinstance(tasks, str):
        raise InputError(
            f"run bundle {manifest.name!r}",
            expected="tasks as a list with one task per row",
            got=f"the string {tasks!r}",
            fix=f"Use task={tasks!r} for one task over the whole batch.",
        )
    if not batched(manifest, manifest.inputs):
        raise InputError(
            f"run bundle {manifest.name!r}",
            expected="task, as it has no batch axis and so no rows",
            got="tasks",
        )
    count = rows(manifest, inputs)
    if len(tasks) != count:
        raise InputError(
            f"run bundle {manifest.name!r}, input {batched(manifest, manifest.inputs)[0].name!r}",
            expected=f"one task per row, {count} for its {count} rows",
            got=f"{len(tasks)} tasks",
        )


def _check_decoder(manifest: Manifest, decoder: DecoderPorts, inputs: Mapping[str, Array]) -> None:
    """Refuse runs for which the attention's operator reads or writes beside a cache, or is not defined."""
    lengths, (rows, chunk) = inputs[decoder.lengths], inputs[decoder.tokens].shape
    if not lengths.size:
        return
    doing = f"run bundle {manifest.name!r}, input {decoder.lengths!r}"
    most = min(decoder.positions, *(inputs[past].shape[2] for past, _ in decoder.caches)) - chunk
    if lengths.min() < 0 or lengths.max() > most:
        raise InputError(doing, expected=f"lengths from 0 to {most}", got=f"{lengths.min()} to {lengths.max()}")
    if chunk > 1 and rows > 1 and lengths.any():
        got = f"{chunk} tokens of each of {rows} rows that have tokens before"
        raise InputError(doing, expected="one row, or one token of each", got=got, fix="Use Runtime.generate.")


def batched(manifest: Manifest, ports: Sequence[Port]) -> list[Port]:
    """Return the ports with the batch as first axis."""
    batch = manifest.batch_axis
    return [port for port in ports if port.shape and port.shape[0] == batch]


def take_rows(manifest: Manifest, inputs: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Some rows of every batched input; the others whole."""
    names = {port.name for port in batched(manifest, manifest.inputs)}
    return {name: array[rows] if name in names else array for name, array in inputs.items()}


def check_outputs(manifest: Manifest, outputs: Sequence[str] | None) -> list[Port]:
    """The outputs that are asked for, in that order; all of them for None.

    Raises:
        InputError: there is no such output.
    """
    if outputs is None:
        return list(manifest.outputs)
    ports = {port.name: port for port in manifest.outputs}
    if isinstance(outputs, str) or not ports.keys() >= {*outputs}:
        unknown = [outputs] if isinstance(outputs, str) else sorted({*outputs} - ports.keys())
        raise InputError(
            f"run bundle {manifest.name!r}",
            expected=f"a list of outputs among {', '.join(ports)}",
            got=", ".join(map(repr, unknown)),
        )
    return [ports[name] for name in dict.fromkeys(outputs)]


def check_apart(manifest: Manifest, outputs: Sequence[Port]) -> None:
    """Refuse outputs that rows of different tasks do not have.

    Raises:
        InputError: naming the first.
    """
    for port in outputs:
        if port.rows == "joint":
            others = [other.name for other in manifest.outputs if other.rows != "joint"]
            raise InputError(
                f"run bundle {manifest.name!r} with a task for each row, output {port.name!r}",
                expected="an output that keeps rows apart",
                got="one that depends on the batch as a whole",
                fix="Send the rows of each task by themselves"
                + (f", or ask for others with outputs=: {', '.join(others)}." if others else "."),
            )


def cut(port: Port, array: Array, size: int) -> Array:
    """The first `size` entries of an output's varying axis, without holding on to the padding."""
    if port.varies is None or array.shape[port.varies.axis] == size:
        return array
    return array.take(range(size), axis=port.varies.axis)


def as_rows(port: Port, array: Array) -> Array | list[Array]:
    """An output as a batch of rows with separate tasks has it: a list where its size varies per task."""
    return array if port.varies is None or port.rows == "joint" else list(array)


def cut_rows(port: Port, array: Array, sizes: Sequence[int]) -> Array | list[Array]:
    """Each row of an output cut to its size, as `as_rows`."""
    if port.varies is None:
        return array
    # Axis 0 is the batch; a single row has one axis less.
    axis = port.varies.axis - 1
    return [row.take(range(size), axis=axis) for row, size in zip(array, sizes, strict=True)]


def rows(manifest: Manifest, inputs: Mapping[str, Array]) -> int:
    """How many rows a batch has."""
    return len(inputs[batched(manifest, manifest.inputs)[0].name])


def _as_array(manifest: Manifest, port: Port, value: object) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"run bundle {manifest.name!r}, input {port.name!r}",
            expected=f"an array of {port.dtype}",
            got=f"what numpy makes none of ({str(error)[:120]})",
        ) from error


def _other_names(manifest: Manifest, inputs: Mapping[str, object]) -> InputError:
    names = [port.name for port in manifest.inputs]
    missing, unknown = sorted(set(names) - set(inputs)), sorted(set(inputs) - set(names))
    return InputError(
        f"run bundle {manifest.name!r}",
        expected=f"inputs {', '.join(names)}",
        got=", ".join(
            [f"no {name!r}" for name in missing] + [f"an unknown {name!r}" for name in unknown],
        ),
    )


_dtype = lru_cache(np.dtype)  # by its name, which numpy would look up each time


def _check_port(manifest: Manifest, port: Port, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    if array.dtype != _dtype(port.dtype):
        fix = f"Convert it with .astype({port.dtype!r})."
        raise _misfit(manifest, port, f"dtype {port.dtype}", array.dtype, fix)
    own = array.shape
    if len(own) != len(port.shape):
        raise _misfit(manifest, port, _shape(port), list(own))
    for size, wanted in zip(own, port.shape, strict=True):
        if isinstance(wanted, str):
            first, owner = sizes.setdefault(wanted, (size, port.name))
            if size != first:
                expected = f"{wanted} = {first}, as in input {owner!r}"
                raise _misfit(manifest, port, expected, f"{size} in {list(own)}")
        elif size != wanted:
            raise _misfit(manifest, port, _shape(port), list(own))
    if 0 in own and any(size not in manifest.empty for size, count in zip(port.shape, own, strict=True) if not count):
        others = f" but {', '.join(manifest.empty)}" if manifest.empty else ""
        raise _misfit(manifest, port, f"at least one row and no empty axis{others}", list(own))


def _misfit(manifest: Manifest, port: Port, expected: str, got: object, fix: str | None = None) -> InputError:
    return InputError(f"run bundle {manifest.name!r}, input {port.name!r}", expected=expected, got=got, fix=fix)


def _shape(port: Port) -> str:
    return "shape [" + ", ".join(map(str, port.shape)) + "]"


class Gathered:
    """Outputs put together from runs of some rows of a batch: those outputs that rows of different tasks have.

    Args:
        ports: output ports.
        count: how many rows the batch has.
    """

    def __init__(self, ports: Sequence[Port], count: int) -> None:
        self._ports = [port for port in ports if port.rows != "joint"]
        self._count = count
        self._rows: dict[str, dict[int, Array]] = {port.name: {} for port in self._ports}
        self._shared: dict[str, Array | list[Array]] = {}

    def put(self, places: Array, outputs: Mapping[str, Array | list[Array]]) -> None:
        """Take the outputs of a run of the rows at some places."""
        for port in self._ports:
            if port.rows == "shared":
                self._shared[port.name] = outputs[port.name]
            else:
                self._rows[port.name] |= dict(zip(places.tolist(), outputs[port.name], strict=True))

    def whole(self) -> dict[str, Array | list[Array]]:
        """The batch's outputs: a list where rows differ in size, as a mixed run gives them."""
        found = dict(self._shared)
        for port in self._ports:
            if port.name not in found:
                own = [self._rows[port.name][place] for place in range(self._count)]
                found[port.name] = own if port.varies else np.stack(own)
        return found

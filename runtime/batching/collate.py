"""Joining the inputs of several requests into one batch, and cutting its outputs back: pure numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.tucker import Array

__all__ = ["Form", "Joiner", "Outputs", "fits"]

Outputs = Mapping[str, Array | list[Array]]


_FORMS = 1024  # number of sizes of requests with remembered forms


@dataclass(slots=True)  # not frozen, which would make each cost more; never changed
class Form:
    """What decides whether requests run as one batch; a batch has a form too.

    Attributes:
        key: requests of different keys never run together.
        rows: size along the batch.
        sizes: size along every paddable name, in a fixed order; the largest of the requests', for a batch.
        elements: elements of all inputs, padding not counted.
        terms: per input, the elements of one row without its paddable axes, and the places in `sizes` of those.
    """

    key: Hashable
    rows: int
    sizes: tuple[int, ...]
    elements: int
    terms: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def padded(self) -> int:
        """Elements of all inputs, padded to `sizes`."""
        return self.rows * sum(fixed * math.prod(self.sizes[place] for place in places) for fixed, places in self.terms)


def fits(batch: Form, request: Form, *, max_waste: float) -> Form | None:
    """The form of a batch with one more request, or None if they should not run together.

    Args:
        batch: a batch, or its first request.
        request: request that may be added.
        max_waste: share of the whole batch's elements that may be padding.
    """
    if batch.key != request.key:
        return None
    if not batch.sizes:  # nothing can be filled up: nothing is wasted, however many they are
        return batch
    sizes = tuple(map(max, batch.sizes, request.sizes))
    joined = Form(batch.key, batch.rows + request.rows, sizes, batch.elements + request.elements, batch.terms)
    return joined if joined.elements >= (1 - max_waste) * joined.padded else None


class Joiner:
    """Joins requests for one model.

    A request can be batched when every input, and every output that it asks for, has the batch as its first axis and
    nowhere else; inputs without axes, and outputs that are the same for all rows, may be among them.  Requests are
    joined when their inputs without axes are equal, and their free sizes are equal, or paddable: every input that has a
    size of that name declares what to fill it up with.

    Args:
        manifest: the model's inputs and outputs.
        max_waste: share of a batch's elements that may be padding.
    """

    def __init__(self, manifest: Manifest, *, max_waste: float) -> None:
        self._manifest = manifest
        # A decoder's rows have pasts of different lengths, which one run takes for single tokens alone.
        self._joinable = (
            manifest.batch_axis is not None
            and manifest.decoder is None
            and all(not port.shape or _by_row(manifest, port) for port in manifest.inputs)
        )
        self._scalars = [port.name for port in manifest.inputs if not port.shape]
        self._ports = {port.name: port for port in manifest.outputs}
        # The outputs that a request may ask for and be joined.
        self._apart = {
            port.name
            for port in manifest.outputs
            if port.rows == "shared" or (port.rows != "joint" and _by_row(manifest, port))
        }
        self._paddable = _paddable(manifest)
        # A model that serves one adapter per run gains nothing from other tasks in the batch: it would run one after
        # the other, and all would wait for the last.
        self._alike = manifest.rows == "group"
        self._first = next((port.name for port in requests.batched(manifest, manifest.inputs)), None)
        self._names = [port.name for port in manifest.inputs]
        self._forms: dict[tuple[tuple[int, ...], ...], Form] = {}  # by the shapes of all inputs
        # What `form` and `_sizes` look at, found once: per input, its axes that cannot be filled up and the places of
        # the sizes that can; and where to read each of those.
        self._axes = [
            (
                port.name,
                tuple(axis for axis, size in enumerate(port.shape) if axis and size not in self._paddable),
                tuple(self._paddable.index(size) for size in port.shape if size in self._paddable),
            )
            for port in manifest.inputs
            if port.shape
        ]
        found = {size: (port.name, axis) for port in manifest.inputs for axis, size in enumerate(port.shape)}
        self._places = {name: found[name] for name in self._paddable}
        self.fits = partial(fits, max_waste=max_waste)

    def rows(self, inputs: Mapping[str, Array]) -> int:
        """Rows of a request; 1 for a model without a batch axis."""
        return 1 if self._first is None else inputs[self._first].shape[0]

    def form(self, inputs: Mapping[str, Array], lane: Hashable, outputs: Sequence[Port] | None = None) -> Form | None:
        """The form of a request, or None if it has to run alone.

        Args:
            inputs: as `requests.check_inputs` gives them.
            lane: version of all rows, or a tuple with one version per row.
            outputs: outputs that it asks for; all by default.
        """
        asked = self._ports if outputs is None else [port.name for port in outputs]
        if not self._joinable or not self._apart.issuperset(asked):
            return None
        shapes = tuple([inputs[name].shape for name in self._names])
        form = self._forms.get(shapes)
        if form is None:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
            form = self._forms[shapes] = self._measured(inputs)
        if self._scalars:
            form = replace(form, key=(form.key, *(inputs[name].tobytes() for name in self._scalars)))
        return replace(form, key=(lane, form.key)) if self._alike else form

    def _measured(self, inputs: Mapping[str, Array]) -> Form:
        fixed = []
        terms = []
        elements = 0
        for name, axes, places in self._axes:
            array = inputs[name]
            own = tuple([array.shape[axis] for axis in axes])
            fixed.append(own)
            terms.append((math.prod(own), places))
            elements += array.size
        return Form(
            key=tuple(fixed),
            rows=self.rows(inputs),
            sizes=tuple([inputs[name].shape[axis] for name, axis in self._places.values()]),
            elements=elements,
            terms=tuple(terms),
        )

    def part(self, inputs: Mapping[str, Array], rows: slice) -> dict[str, Array]:
        """Some rows of a request that has a form, as views."""
        return {name: array[rows] if array.shape else array for name, array in inputs.items()}

    def join(self, parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """One batch of the inputs of several requests; those of a single request as they are."""
        if len(parts) == 1:
            return dict(parts[0])
        return {port.name: _stack(port, [part[port.name] for part in parts]) for port in self._manifest.inputs}

    def cut(
        self,
        outputs: Outputs,
        parts: Sequence[Mapping[str, Array]],
        *,
        apart: Sequence[bool] | None = None,
        wanted: Sequence[Sequence[Port]] | None = None,
    ) -> list[dict[str, Array | list[Array]]]:
        """The outputs of a batch, one dict per request, without padding, each in separate memory.

        Args:
            outputs: output name -> array, or a list of arrays, one a row.
            parts: the inputs of the requests, in the order in which they were joined.
            apart: for each request, whether outputs with a size per task stay a list with one array a row; no
                request's by default.
            wanted: for each request, the outputs that it asks for; all by default.

        Raises:
            RunError: an output does not have the sizes that the manifest says.
        """
        kept = apart or [False] * len(parts)
        asked = wanted or [self._manifest.outputs] * len(parts)
        if len(parts) == 1:
            return [{port.name: outputs[port.name] if kept[0] else _whole(outputs[port.name]) for port in asked[0]}]
        ends = list(itertools.accumulate([self.rows(part) for part in parts]))
        own = [self._sizes(part) for part in parts]
        padded = {name: max(sizes[name] for sizes in own) for name in self._paddable}
        for port in dict.fromkeys(port.name for ports in asked for port in ports):
            self._check(self._ports[port], outputs[port], ends[-1], padded)
        return [
            {port.name: self._cut(port, outputs[port.name], slice(start, end), sizes, keep) for port in ports}
            for ports, sizes, keep, start, end in zip(asked, own, kept, [0, *ends], ends, strict=False)
        ]

    def _cut(
        self, port: Port, output: Array | list[Array], rows: slice, sizes: Mapping[str, int], keep: bool
    ) -> Array | list[Array]:
        """A request's own part of one output."""
        row = tuple(slice(sizes.get(name)) if isinstance(name, str) else slice(None) for name in port.shape[1:])
        if isinstance(output, list):
            parts = [part[row] for part in output[rows]]
            return [part.copy() for part in parts] if keep else np.stack(parts)
        if port.rows == "shared":
            return output[tuple(slice(sizes.get(str(size))) for size in port.shape)].copy()
        return output[(rows, *row)].copy()

    def _sizes(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """A request's own size along every paddable name."""
        return {size: inputs[name].shape[axis] for size, (name, axis) in self._places.items()}

    def _check(self, port: Port, output: Array | list[Array], rows: int, padded: Mapping[str, int]) -> None:
        """Refuse what would be cut in the wrong places: a wrong answer is worse than none."""
        got = [len(output), *output[0].shape] if isinstance(output, list) else list(output.shape)
        wanted = {
            axis: padded[name] for axis, name in enumerate(port.shape) if isinstance(name, str) and name in padded
        }
        if port.rows != "shared":
            wanted[0] = rows
        if len(got) != len(port.shape) or any(got[axis] != size for axis, size in wanted.items()):
            raise RunError(
                f"cut output {port.name!r} of bundle {self._manifest.name!r} into the answers of its requests",
                expected=[wanted.get(axis, name) for axis, name in enumerate(port.shape)],
                got=got,
                fix="The model does not keep the sizes that its manifest names: send its requests to `run` instead.",
            )


def _by_row(manifest: Manifest, port: Port) -> bool:
    """Whether the first axis, and no other, is the batch: one such as "2*batch" mixes rows too."""
    return manifest.batch_axes(port) == [0] and port.shape[0] == manifest.batch_axis


def _paddable(manifest: Manifest) -> list[str]:
    """Names of the sizes that every input having them can fill up, and every output having them can be cut back to."""
    free = _free(manifest.inputs)
    for port in manifest.outputs:
        varying = port.varies.axis if port.varies else None
        if any(isinstance(size, str) and axis != varying and size not in free for axis, size in enumerate(port.shape)):
            # A size such as "(length - 1)//2 + 1" would grow with the padding, and nothing says by how much.
            return []
    return sorted(manifest.paddable)


def _free(ports: Sequence[Port]) -> list[str]:
    return list(dict.fromkeys(size for port in ports for size in port.shape if isinstance(size, str)))


def _stack(port: Port, arrays: Sequence[Array]) -> Array:
    if not port.shape:
        return arrays[0]  # requests of other values are not joined
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    if port.pad is None:
        raise ValueError(f"input {port.name!r} has no pad value, but other sizes in one batch")
    shape = (sum(len(array) for array in arrays), *map(max, *(array.shape[1:] for array in arrays)))
    batch = np.full(shape, port.pad, arrays[0].dtype)
    start = 0
    for array in arrays:
        batch[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return batch


def _whole(output: Array | list[Array]) -> Array:
    return np.stack(output) if isinstance(output, list) else output

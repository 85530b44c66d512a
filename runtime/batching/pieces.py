"""Requests of more rows than one run takes, cut into pieces, and the pieces' answers put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.batching.calls import Answered, Call
from tpeft_deploy.runtime.batching.collate import Form, Joiner
from tpeft_deploy.runtime.batching.policy import Limits, Request
from tpeft_deploy.tucker import Array

__all__ = ["Whole", "cut", "lane"]


class Whole:
    """A call that is cut; answers are copied into place as they come, so that each is in memory once.

    Args:
        call: more rows than one run should have.
        most: rows of a piece.
        limits: say what a piece counts as.
        joiner: cuts the inputs.
        number: gives each request its id.
    """

    def __init__(self, call: Call, most: int, limits: Limits, joiner: Joiner, number: Callable[[], int]) -> None:
        self.pieces: list[Call] = []
        self._ports = call.options.outputs
        self.rows = call.request.rows
        self._count = -(-self.rows // most)
        self._make = partial(self._piece, call, most, limits, joiner, number)
        self._lock = threading.Lock()  # guards the answers, which several workers may bring
        self._answered: set[int] = set()
        self._arrays: dict[str, Array] = {}
        self._lists: dict[str, list[Array]] = {}
        first = self._make(0)
        last = self.rows - (self._count - 1) * most
        per_row = first.request.cost / first.request.rows
        first.request.asked = (self._count - 1) * first.request.size + limits.size(last, last * per_row)

    def others(self) -> Iterator[Request[Form]]:
        """The requests of the pieces after the first, made when they are asked for: many calls are refused before."""
        for place in range(1, self._count):
            yield self._make(place).request

    def release(self) -> None:
        """Forget the pieces, which refer to this."""
        self.pieces = []
        del self._make

    def _piece(
        self, call: Call, most: int, limits: Limits, joiner: Joiner, number: Callable[[], int], place: int
    ) -> Call:
        whole = call.request
        rows = slice(place * most, min((place + 1) * most, self.rows))
        inputs = joiner.part(call.inputs, rows)
        versions = call.versions[rows] if call.options.apart else call.versions
        own = lane(versions)
        form = joiner.form(inputs, own, call.options.outputs)
        count = rows.stop - rows.start
        cost = whole.cost if form is None else form.elements
        request = Request(
            number(),
            count,
            form,
            deadline=whole.deadline,
            tenant=whole.tenant,
            cost=cost,
            lane=own,
            priority=whole.priority,
            size=limits.size(count, cost),
            call=whole.id,
            asked=0,
            places=whole.places,
        )
        piece = Call(request, inputs, call.held, versions, call.options, call.future, whole=self, start=rows.start)
        self.pieces.append(piece)
        return piece

    def put(self, piece: Call, answer: Answered) -> Answered | None:
        """Take the answer of a piece.

        Returns:
            The answer of the whole call, once all pieces have theirs.

        Raises:
            RunError: an output has other sizes than that of another piece.
        """
        with self._lock:
            return self._put(piece, answer)

    def _put(self, piece: Call, answer: Answered) -> Answered | None:
        start = piece.start
        for port in self._ports:
            part = answer[port.name]
            if isinstance(part, list):
                rows = self._lists.setdefault(port.name, self.rows * [np.empty(0)])
                rows[start : start + len(part)] = part
            elif port.rows == "shared":
                self._arrays.setdefault(port.name, part)
            else:
                self._copy(port, part, start, piece.request.rows)
        self._answered.add(start)
        return {**self._arrays, **self._lists} if len(self._answered) == self._count else None

    def _copy(self, port: Port, part: Array, start: int, rows: int) -> None:
        array = self._arrays.get(port.name)
        if array is None:
            array = self._arrays[port.name] = np.empty((self.rows, *part.shape[1:]), part.dtype)
        if part.shape != (rows, *array.shape[1:]):
            raise RunError(
                f"put output {port.name!r} of the runs of a large request together",
                expected=[rows, *array.shape[1:]],
                got=list(part.shape),
                fix="The sizes of this output depend on the batch: send fewer rows at once.",
            )
        array[start : start + rows] = part


def lane(versions: Sequence[Version]) -> Version | tuple[Version, ...]:
    """Return the key that an order takes turns between: the version that all rows are on, or all versions."""
    return versions[0] if len(versions) == 1 or len(set(versions)) == 1 else tuple(versions)


def cut(call: Call, limits: Limits, joiner: Joiner, number: Callable[[], int]) -> Call:
    """The first piece of a call that is larger than a run, or the call itself where its rows are not independent.

    Args:
        call: more rows or elements than one run should have.
        limits: bounds of a run and of a request.
        joiner: says which rows are independent.
        number: gives each request its id.

    Raises:
        TooLarge: it is more than a request may have.
    """
    request = call.request
    limits.check(request.rows, request.cost, alone=request.form is None)
    most = limits.rows_of_a_run(request.rows, request.cost)
    if request.form is None or request.rows <= most:
        request.size = request.asked = limits.size(request.rows, request.cost)
        return call
    return Whole(call, most, limits, joiner, number).pieces[0]

"""A request of more rows than one run takes: its pieces, and their answers put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tpeft_deploy.errors import RunError
from tpeft_deploy.manifest import Port
from tpeft_deploy.runtime.batching import Limits
from tpeft_deploy.runtime.joining import Joiner, Task
from tpeft_deploy.tucker import Array

if TYPE_CHECKING:
    from tpeft_deploy.runtime.calls import Answered, Call

__all__ = ["Whole", "cut", "lane"]


class Whole:
    """The pieces of a call; answers are copied to where they belong as they come, so that each is held once.

    Args:
        ports: outputs that are asked for.
        rows: rows of the call.
    """

    def __init__(self, ports: Sequence[Port], rows: int) -> None:
        self.pieces: list[Call] = []
        self._ports = ports
        self._rows = rows
        self._answered: set[int] = set()
        self._arrays: dict[str, Array] = {}
        self._lists: dict[str, list[Array]] = {}

    def put(self, piece: Call, answer: Answered) -> Answered | None:
        """Take the answer of a piece.

        Returns:
            The answer of the whole call, once all pieces have theirs.

        Raises:
            RunError: an output has other sizes than that of another piece.
        """
        start = piece.start
        for port in self._ports:
            part = answer[port.name]
            if isinstance(part, list):
                rows = self._lists.setdefault(port.name, self._rows * [np.empty(0)])
                rows[start : start + len(part)] = part
            elif port.rows == "shared":
                self._arrays.setdefault(port.name, part)
            else:
                self._copy(port, part, start, piece.request.rows)
        self._answered.add(start)
        return {**self._arrays, **self._lists} if len(self._answered) == len(self.pieces) else None

    def _copy(self, port: Port, part: Array, start: int, rows: int) -> None:
        array = self._arrays.get(port.name)
        if array is None:
            array = self._arrays[port.name] = np.empty((self._rows, *part.shape[1:]), part.dtype)
        if part.shape != (rows, *array.shape[1:]):
            raise RunError(
                f"put output {port.name!r} of the runs of a large request together",
                expected=[rows, *array.shape[1:]],
                got=list(part.shape),
                fix="The sizes of this output depend on the batch: send fewer rows at once.",
            )
        array[start : start + rows] = part


def lane(tasks: Sequence[Task]) -> Task:
    """What an order takes turns between: the task that all rows are on, or one of their tuples."""
    return tasks[0] if len(tasks) == 1 or len(set(tasks)) == 1 else tuple(tasks)


def cut(call: Call, limits: Limits, joiner: Joiner, number: Callable[[], int]) -> list[Call]:
    """The calls that wait in place of one that is larger than a run: views of its inputs, in order.

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
    request.size = request.asked = limits.size(request.rows, request.cost)
    most = limits.rows_of_a_run(request.rows, request.cost)
    if request.form is None or request.rows <= most:
        return [call]
    whole = Whole(call.outputs, request.rows)
    for start in range(0, request.rows, most):
        rows = slice(start, min(start + most, request.rows))
        inputs = joiner.part(call.inputs, rows)
        tasks = call.tasks[rows] if call.apart else call.tasks
        own = lane(tasks)
        form = joiner.form(inputs, own, call.outputs)
        count = rows.stop - start
        cost = request.cost if form is None else form.elements
        piece = replace(
            request,
            id=number(),
            rows=count,
            form=form,
            lane=own,
            cost=cost,
            size=limits.size(count, cost),
            call=request.id,
            asked=0,
        )
        whole.pieces.append(replace(call, request=piece, inputs=inputs, tasks=tasks, whole=whole, start=start))
    whole.pieces[0].request.asked = sum(piece.request.size for piece in whole.pieces)
    return whole.pieces

"""Requests of many callers as batches on a worker thread of each device."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnxruntime

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import QueueFull, RunError, TooLarge, TpeftError
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.batching.calls import Answered, Call, CallResult, InferOptions, Run, answer
from tpeft_deploy.runtime.batching.collate import Form, Joiner, Outputs
from tpeft_deploy.runtime.batching.pieces import cut, lane
from tpeft_deploy.runtime.batching.policy import Limits, Order, Queue, Request
from tpeft_deploy.runtime.batching.stats import BatchingStats
from tpeft_deploy.tucker import Array

__all__ = ["Batcher", "RunBatch"]

RunBatch = Callable[[Mapping[str, Array], Sequence[Version], onnxruntime.RunOptions], Outputs]

_log = logging.getLogger("tpeft_deploy.runtime")

# A worker that has been idle for so many seconds ends, so that a runtime that was never closed can be collected.
_IDLE_SECONDS = 5.0


class Batcher:
    """Joins requests into batches; any number of event loops, in any threads, may send them.

    Args:
        manifest: the model's inputs and outputs.
        run_batch: inputs, an acquired version of each row (one in all for a model without a batch axis) and run options
            -> outputs, an array or a list with one array a row; called from one thread, one call at a time.
        limits: bounds.
        order: scheduling order; first come, first served by default.
        clock: seconds since any moment.
        more: as `run_batch`, for further devices, each called from a separate thread.
    """

    def __init__(
        self,
        manifest: Manifest,
        run_batch: RunBatch,
        limits: Limits,
        *,
        order: Order[Form] | None = None,
        clock: Callable[[], float] = time.monotonic,
        more: Sequence[RunBatch] = (),
    ) -> None:
        self._name = manifest.name
        self._run_batch = run_batch
        self._more = more
        self._clock = clock
        self._joiner = Joiner(manifest, max_waste=limits.max_waste)
        self._limits = limits
        # What fits into one run and needs no closer look.
        self._most_rows = min(limits.max_rows, limits.max_request_rows or limits.max_rows)
        self._most_elements = limits.max_run_elements or math.inf
        self._queue: Queue[Form] = Queue(limits, self._joiner.fits, order, self._evict, 1 + len(more))
        # Guards everything below and the queue.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # notified when the workers should look again
        self._asleep: set[int] = set()  # workers that wait for that
        self._ids = itertools.count()
        self._calls: dict[int, Call] = {}  # those in the queue
        self._runs: dict[int, Run] = {}  # by worker
        self._workers: dict[int, threading.Thread] = {}
        self._closed = False
        self._joined: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()

    async def infer(self, inputs: Mapping[str, Array], held: Held, options: InferOptions) -> Answered:
        """Run a request, in a batch with others where they fit, or in several runs where it has too many rows for one.

        Cancelling the awaiting task takes the request out of the queue, or stops its run once all others in it are
        cancelled or overdue too.

        Args:
            inputs: arrays from `requests.check_inputs`, not changed before the answer is there.
            held: version of all rows, or of each; released here, at the latest when a run that uses it ends.
            options: options of the request.

        Returns:
            Output name -> array.

        Raises:
            TooLarge: it has more rows, or longer ones, than the limits allow.
            QueueFull: too many rows wait already, or it had to leave for a tenant with fewer.
            DeadlineExceeded: the time is over; a request that was still waiting never runs.
            RunError: the batcher is closed.
            TpeftError: error of an order that refuses the request.
        """
        try:
            call = self._call(inputs, held, options)
        except BaseException:
            held.release()
            raise
        timer = None
        if options.timeout is not None:
            # On the caller's loop, so that it is on time while the worker is busy with others.
            timer = call.future.get_loop().call_later(options.left, self._expire, call)
        try:
            return await call.future
        finally:
            if timer is not None:
                timer.cancel()
            if call.whole is not None or not call.gone:
                self._leave(call, "cancelled")
            if call.future.done() and not call.future.cancelled():
                # A task cancelled just now does not look at its answer; asyncio would log an unretrieved error.
                call.future.exception()
            call.release()
            # No later run has it: the call was answered, or left, under the lock.
            if not self._runs or not self._release_after_run(held):
                held.release()

    def _call(self, inputs: Mapping[str, Array], held: Held, options: InferOptions) -> Call:
        """Return a request that waits in the queue."""
        # Rows that are all on one version are in the lane of that version, and join its other requests.
        own = lane(held.versions)
        form = self._joiner.form(inputs, own, options.outputs)
        request = Request(
            next(self._ids),
            self._joiner.rows(inputs) if form is None else form.rows,
            form,
            deadline=options.deadline,
            tenant=options.tenant,
            cost=sum(array.size for array in inputs.values()) if form is None else form.elements,
            lane=own,
            priority=options.priority,
            places=held.places,
        )
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        call = Call(request, inputs, held, held.versions, options, future)
        if request.rows > self._most_rows or request.cost > self._most_elements:
            call = self._cut(call)
        elif request.cost * self._limits.max_rows > request.rows * self._most_elements:
            request.size = request.asked = self._limits.size(request.rows, request.cost)
        try:
            self._admit(call)
        except BaseException:
            call.release()
            raise
        return call

    def _release_after_run(self, held: Held) -> bool:
        """Leave the release to the end of a present run that uses the versions, if there is one."""
        if not any(held in run.held for run in list(self._runs.values())):
            return False
        with self._lock:
            return self._pass_on(held)

    def _pass_on(self, held: Held) -> bool:
        for run in self._runs.values():
            if held in run.held:
                run.left.append(held)
                return True
        return False

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Refuse a request that is too large for `infer`, whatever waits.

        Raises:
            TooLarge: it has more rows, or longer ones, than the limits allow.
        """
        elements = sum(array.size for array in inputs.values() if array.shape)
        self._limits.check(self._joiner.rows(inputs), elements, alone=False)

    def figures(self) -> BatchingStats:
        """Return the counters so far, and the size of the queue."""
        with self._lock:
            return BatchingStats(
                waiting_requests=len(self._queue),
                waiting_rows=self._queue.rows,
                batches=self._joined.total(),
                rows=self._counts["rows"],
                joined=dict(self._joined),
                refused=self._counts["refused"],
                overdue=self._counts["overdue"],
                cancelled=self._counts["cancelled"],
                stopped=self._counts["stopped"],
            )

    def close(self) -> None:
        """Refuse new requests, fail those that wait, and return once the batches that run are answered."""
        with self._lock:
            self._closed = True
            waiting = list(self._calls.values())
            self._calls.clear()
            for call in waiting:
                self._queue.cancel(call.request.id)
            self._answer([(call, self._closed_error(call.name)) for call in waiting])
            self._changed.notify_all()
            workers = list(self._workers.values())
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join()

    def _cut(self, call: Call) -> Call:
        """The first piece of a call that is larger than a run, or the call itself where it runs alone."""
        try:
            return cut(call, self._limits, self._joiner, lambda: next(self._ids))
        except TooLarge:
            with self._lock:
                self._counts["refused"] += 1
            raise

    def _admit(self, call: Call) -> None:
        with self._lock:
            if self._closed:
                raise self._closed_error(call.name)
            for place in call.request.places:
                if place not in self._workers:
                    name = f"batcher of {self._name}"
                    worker = threading.Thread(target=self._work, args=(place,), name=name, daemon=True)
                    worker.start()
                    self._workers[place] = worker
            now = self._clock()
            if call.request.deadline <= now:
                self._counts["overdue"] += 1
                raise call.overdue()
            try:
                due = self._queue.add(call.request, now, () if call.whole is None else call.whole.others())
            except TpeftError:
                self._counts["refused"] += 1
                raise
            for piece in call.together:
                self._calls[piece.request.id] = piece
            # A worker that is woken for nothing costs as much as a request.
            if due and not self._asleep.isdisjoint(call.request.places):
                self._asleep.clear()
                self._changed.notify_all()

    def _expire(self, call: Call) -> None:
        if self._leave(call, "overdue") and not call.future.done():
            call.future.set_exception(call.overdue())

    def _leave(self, call: Call, why: str) -> bool:
        """Note that a caller does not wait any more; False if it has its answer, or left before."""
        with self._lock:
            left = self._drop(call)
            self._counts[why] += left
            return left

    def _drop(self, call: Call) -> bool:
        """Take a call with all its pieces out of the queue, and stop its run if all other callers in it have left."""
        left = [piece for piece in call.together if not piece.gone]
        for piece in left:
            piece.gone = True
            if self._queue.cancel(piece.request.id):
                del self._calls[piece.request.id]
                continue
            for run in self._runs.values():
                if piece in run.calls and all(other.gone for other in run.calls):
                    run.options.terminate = True
                    self._counts["stopped"] += 1
        return bool(left)

    def _evict(self, request: Request[Form]) -> None:
        """Refuse a request that the queue took out for one of another tenant."""
        call = self._calls.pop(request.id)
        self._counts["refused"] += 1
        full = QueueFull(
            f"run {call.name}",
            expected="room in the queue until its turn",
            got="a request of a tenant with fewer rows waiting",
            fix="Send it again later, or send less at once.",
        )
        self._answer([(call, full)])

    def _answer(self, answers: Iterable[CallResult]) -> None:
        """Hand out answers; an error of one piece is the error of the whole call, and ends the other pieces."""
        told = []
        for call, result in answers:
            if call.whole is not None and not call.gone:
                call.gone = True
                if result is None:
                    continue  # other pieces are still to come
                self._drop(call)
                call.gone = False
            told.append((call, result))
        answer(told)

    def _work(self, place: int) -> None:
        while self._turn(place):
            pass

    def _turn(self, place: int) -> bool:
        """Wait for a batch and run it; False when the worker has to end.  A function, so that no batch is kept."""
        calls = self._take(place)
        if calls is None:
            return False
        if not self._attempt(calls, place):
            # One request may spoil the batch for all: each alone, only the bad ones fail.
            for call in calls:
                self._attempt([call], place)
        return True

    def _take(self, place: int) -> list[Call] | None:
        with self._lock:
            while not self._closed:
                now = self._clock()
                over = [self._calls.pop(request.id) for request in self._queue.expire(now)]
                self._counts["overdue"] += len({id(call.future) for call in over if not call.gone})
                self._answer([(call, call.overdue()) for call in over])
                found = self._queue.next(now, place)
                if isinstance(found, list):
                    return [self._calls.pop(request.id) for request in found]
                self._asleep.add(place)
                woken = self._changed.wait(min(max(found - now, 0), _IDLE_SECONDS))
                self._asleep.discard(place)
                if not woken and not len(self._queue):
                    break
            del self._workers[place]
            return None

    def _attempt(self, calls: Sequence[Call], place: int) -> bool:
        """Run requests as one batch and answer them; False, with nothing answered, if a batch of several failed."""
        run = self._begin(calls, place)
        if run is None:
            return True
        parts = [call.inputs for call in run.calls]
        versions = [version for call in run.calls for version in call.per_row]
        apart = [call.options.apart for call in run.calls]
        wanted = [call.options.outputs for call in run.calls]
        answers: list[CallResult] = []
        began = self._clock()
        try:
            run_batch = self._more[place - 1] if place else self._run_batch
            outputs = run_batch(self._joiner.join(parts), versions, run.options)
            found = self._joiner.cut(outputs, parts, apart=apart, wanted=wanted)
            for call, own in zip(run.calls, found, strict=True):
                answers.append((call, own if call.whole is None else call.whole.put(call, own)))
        except Exception as error:
            _log.debug("a batch of %d requests on bundle %r failed", len(run.calls), self._name, exc_info=True)
            if len(run.calls) > 1:
                return False
            answers.append((run.calls[0], error))
        finally:
            with self._lock:
                del self._runs[place]
                now = self._clock()
                self._queue.ended(now, place)
                _time(run.calls, began, now)
                self._answer(answers)
                # Pieces of one request may be in the runs of several workers.
                unused = [held for held in run.left if not self._pass_on(held)]
            for held in unused:
                held.release()
            answers.clear()  # an error in them refers to this frame
        return True

    def _begin(self, calls: Iterable[Call], place: int) -> Run | None:
        with self._lock:
            wanted = [call for call in calls if not call.gone]
            if not wanted:
                self._queue.ended(self._clock(), place)
                return None
            run = self._runs[place] = Run(wanted)
            self._joined[len(wanted)] += 1
            self._counts["rows"] += sum(call.request.rows for call in wanted)
            return run

    def _closed_error(self, name: str) -> RunError:
        return RunError(
            f"run {name} on bundle {self._name!r}",
            problem="the runtime is closed",
            fix="Open the bundle again.",
        )


def _time(calls: Sequence[Call], began: float, ended: float) -> None:
    rows = sum(call.request.rows for call in calls)
    for call in calls:
        if call.options.timing is not None:
            call.options.timing.add(began, ended, rows)

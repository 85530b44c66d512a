"""The face of the runtime: one bundle, many tasks, any mixture of them in a batch."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, overload

import onnxruntime

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle, check_task
from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import AdapterError, InputError, RunError, UnknownTask
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.bank import Layout
from tpeft_deploy.runtime.adapters.loader import Holder
from tpeft_deploy.runtime.adapters.residency import Tiers
from tpeft_deploy.runtime.adapters.task_versions import Catalogue, Task
from tpeft_deploy.runtime.adapters.version import Content, Source, Tier, Version
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.batching.dispatch import Answering
from tpeft_deploy.runtime.batching.policy import Limits, Order
from tpeft_deploy.runtime.batching.stats import Figures
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.batching.worker import Batcher
from tpeft_deploy.runtime.engine import Engine, Outputs
from tpeft_deploy.runtime.folding.compare import differs
from tpeft_deploy.runtime.folding.manager import Folds
from tpeft_deploy.runtime.pins import Pins
from tpeft_deploy.runtime.private_copy import PrivateCopy
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import Cuda, choose
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs, open_banked
from tpeft_deploy.tucker import Array

__all__ = ["Runtime"]

GIB = 2**30
_REGISTERED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:-]{0,127})?/[A-Za-z0-9][A-Za-z0-9._:-]{0,127}@[1-9][0-9]{0,17}")
_log = logging.getLogger("tpeft_deploy.runtime")


class Runtime:
    """Serves the tasks of a bundle; safe to call from several threads.

    Every digest is checked before anything is served.

    Args:
        bundle: a bundle's directory.
        provider: "cuda", "cpu", or "auto": CUDA where it works, else the CPU; `provider` and `provider_reason` say
            which and why.
        threads: intra-op threads of each session; by default one per core.
        device_bytes: bytes for adapters on the device.  The least recently used are evicted; pinned ones stay.
            While the bank grows, the old one lives until its runs are done.
        host_bytes: bytes for copies of adapters in host memory, so that those that had to leave the device
            return without being read again; by default 1 GiB on CUDA, none on the CPU.
        folded_bytes: bytes for sessions of hot tasks: the tasks that most rows ask for are folded in the background
            as far as this goes, and unfolded when others are hotter.  `pin(task, folded=True)` needs no budget.
        session_bytes: bytes for the weights and intermediate results of each session on CUDA; by default all memory.
        cuda_graphs: on CUDA, record runs of the bank as CUDA graphs, one for each shape that comes again; inputs are
            filled up to a few shapes for it (see `captured`).
        pinned_share: part of the rows that `device_bytes` has room for, the base's not counted, which pinned tasks may
            take; they give way where adapters of larger ranks leave fewer rows.
        limits: how requests of `infer` are joined and how many may wait; 32 rows and 2 ms by default.
        order: which of the requests that wait is next; first come, first served by default.
        preload: bring the bundle's tasks to the device now, by name, as far as there is room; else each when it is
            first asked for.
        own_copy: serve from a copy of graphs and weights in the directory for temporary files, which goes with the
            runtime.  Without, ONNX Runtime maps the bundle's own weights.data: whoever writes to it changes answers,
            whoever truncates it kills the process.

    Raises:
        BundleError: the directory is not a bundle, or something in it was altered.
        ProviderUnavailable: CUDA was asked for by name and cannot be used.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: int | None = None,
        device_bytes: int = GIB,
        host_bytes: int | None = None,
        folded_bytes: int = 0,
        session_bytes: int | None = None,
        cuda_graphs: bool = False,
        pinned_share: float = 1.0,
        limits: Limits | None = None,
        order: Order[Form] | None = None,
        preload: bool = True,
        own_copy: bool = True,
    ) -> None:
        choice = choose(provider)
        self.provider = choice.device
        self.provider_reason = choice.reason
        # Resolved, as tasks are read later, wherever the process has gone.
        self._bundle = Bundle.open(Path(bundle).resolve())
        self._manifest = self._bundle.manifest
        cuda = Cuda(memory_bytes=session_bytes, graphs=cuda_graphs)
        sessions = SessionFactory.of(self._manifest, choice, threads=threads, cuda=cuda)
        graphs = ServedGraphs.on(sessions.device, self._manifest)
        copy = PrivateCopy(self._bundle, graphs.files if own_copy else [])
        self._release = weakref.finalize(self, copy.close)  # also where nobody closes the runtime
        with ExitStack() as failed:  # not left to the collector: the exception refers to this object
            failed.callback(self._release)
            if not own_copy:
                self._bundle.check_file("weights.data")
            self._base = copy.bundle if own_copy else self._bundle
            self._layout = Layout.of(self._base, graphs.packing)
            self._tiers = Tiers(
                self._layout,
                self._lay_out,
                choice.device,
                device_bytes=device_bytes,
                host_bytes=(GIB if choice.device == "cuda" else 0) if host_bytes is None else host_bytes,
                pinned_share=pinned_share,
            )
            self._catalogue = Catalogue(self._bundle, self._retire)
            self._folds = Folds(self._base, sessions, self._banked_answer, place=copy.path, budget=folded_bytes)
            self._pins = Pins(self._catalogue, self._tiers, self._folds)
            self._session, remark = open_banked(self._base, graphs, sessions)
            if remark:
                self.provider_reason += f"; {remark}"
            self._engine = Engine(self._manifest, self._session, self._tiers, self._folds, self._bundle.sizes(None))
            limits = Limits() if limits is None else limits
            self._batcher = Batcher(self._manifest, self._run_batch, limits, order=order)
            self._holder = Holder(self._tiers, limits.max_queue_rows)
            self._answering = Answering(self._manifest, self._tiers, self._holder, self._batcher)
            if isinstance(self._session, Captured):
                failed.callback(self._session.close)
            if preload:
                self._preload()
            failed.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self._manifest.name

    @property
    def tasks(self) -> list[str]:
        """The tasks that can be run, without `base`."""
        return self._catalogue.tasks

    def residency(self, tasks: Iterable[str] | None = None) -> dict[str, Tier]:
        """Where tasks are: "disk", "host", "device" (a row of the bank), or "folded" (a separate session).

        Args:
            tasks: names; all by default.  Those that are unknown, and the base, are left out.
        """
        found: dict[str, Tier] = {}
        for task in self.tasks if tasks is None else tasks:
            try:
                version = self._catalogue.find(task)
            except UnknownTask:  # forgotten by another thread
                continue
            if version is not None:
                found[task] = "folded" if self._folds.has(version) else self._tiers.tier(version)
        return found

    def usage(self) -> dict[str, int]:
        """Bytes that adapters take: `device_bytes`, `host_bytes`, `folded_bytes`; `rows_taken` of `rows`.

        `device_bytes` is the bank, the sum of `device_adapter_bytes`, what the adapters on the device hold, and
        `device_reserved_bytes`: the base's row, padding to the largest ranks, and rows that wait for an adapter.
        """
        return self._tiers.usage() | {"folded_bytes": self._folds.nbytes}

    def pins(self) -> dict[str, bool]:
        """The tasks that are pinned, and whether each is to have a separate session."""
        return self._pins.all()

    def batching(self) -> Figures:
        """What `infer` has joined and refused so far, and what waits."""
        return self._batcher.figures()

    @overload
    def run(
        self, inputs: Mapping[str, object], task: Task = BASE_TASK, *, outputs: Sequence[str] | None = None
    ) -> dict[str, Array]: ...

    @overload
    def run(
        self, inputs: Mapping[str, object], *, tasks: Sequence[Task], outputs: Sequence[str] | None = None
    ) -> Outputs: ...

    def run(
        self,
        inputs: Mapping[str, object],
        task: Task | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array] | Outputs:
        """Run a batch, in one run however many rows it has: at once, beside the requests of `infer`.

        Args:
            inputs: input name -> array; the first axis is the batch.
            task: one task for all rows, or a weighted set of tasks, {"style": 0.7, "domain": 1.0}; the base when
                neither `task` nor `tasks` is given.
            tasks: one task (or set) per row; `base` is a task too.
            outputs: names of those to return; all by default.  Rows of different tasks have none that depends on the
                batch as a whole, as scores of every row against every other do.

        Returns:
            Output name -> array.  With `tasks`, an output whose size varies per task is a list of arrays, one a
            row, each of the size of its task.

        Raises:
            UnknownTask: there is no such task; the message names its row.
            InputError: an input does not fit the model, tasks do not fit the rows, there is no such output, or rows of
                different tasks do not have it; nothing has run.
            CompositionError: a set has no exact sum.
            AdapterError, BundleError: a task that was not resident cannot be read.
            CapacityError: a task does not fit into the budget beside those that are pinned.
        """
        arrays = requests.check_inputs(self._manifest, inputs)
        ports = requests.check_outputs(self._manifest, outputs)
        versions = self._found(arrays, task, tasks, ports)
        if tasks is None:
            whole = self._engine.run_one(arrays, versions[0])
            return {port.name: whole[port.name] for port in ports}
        found = self._engine.run_rows(arrays, versions)
        return {port.name: found[port.name] for port in ports}

    @overload
    async def infer(
        self,
        inputs: Mapping[str, object],
        task: Task = BASE_TASK,
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        timing: Timing | None = None,
    ) -> dict[str, Array]: ...

    @overload
    async def infer(
        self,
        inputs: Mapping[str, object],
        *,
        tasks: Sequence[Task],
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        timing: Timing | None = None,
    ) -> Outputs: ...

    async def infer(
        self,
        inputs: Mapping[str, object],
        task: Task | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        timing: Timing | None = None,
    ) -> dict[str, Array] | Outputs:
        """Run a request together with those of others, of any task: what `run` answers, later by a few milliseconds.

        Requests are joined where their other axes are equal, or where the manifest says what they may be filled up
        with.  Cancelling takes the request out of its batch, and stops the run once nobody waits for it.  A request
        that cannot be answered fails alone.  One of more than `max_rows` rows is answered by several runs, which those
        of others alternate with, where its rows do not depend on one another.

        Args:
            inputs: input name -> array; the first axis is the batch.
            task: one task for all rows, or a weighted set of tasks.
            tasks: one task (or set) per row, as for `run`.
            outputs: names of those to return, as for `run`.  A request for one that depends on the batch as a
                whole runs alone.
            timeout: seconds after which the answer is of no use.
            tenant: tenant that the order of the queue charges for the request.
            priority: for that order; the smaller first.
            timing: is told when the request's run began and ended.

        Raises:
            UnknownTask, InputError, CompositionError, AdapterError, BundleError, CapacityError: as `run`.
            TooLarge: it is more than the limits of a request allow; none are set by default.
            QueueFull: too many rows wait already.
            DeadlineExceeded: the time was over first.
            TpeftError: what the order of the queue raises that does not take it.
        """
        arrays = requests.check_inputs(self._manifest, inputs)
        ports = requests.check_outputs(self._manifest, outputs)
        versions = self._found(arrays, task, tasks, ports)
        return await self._answering.infer(
            arrays,
            versions,
            apart=tasks is not None,
            outputs=ports,
            timeout=timeout,
            tenant=tenant,
            priority=priority,
            timing=timing,
        )

    def load(self, task: str, adapter: str | os.PathLike[str] | Adapter | None = None) -> None:
        """Serve an adapter, in place of an earlier one of that name; the bundle on disk stays as it is.

        It is read, checked and on the device when this returns.  Runs in flight finish on the earlier one.

        Args:
            task: the name to serve it under.
            adapter: a path or module as `load_adapter` takes it, or an adapter, which is copied; None
                for the version that the bundle now has on disk under that name.

        Raises:
            AdapterError: it cannot be read or does not fit; the old one goes on being served.
            BundleError: the name is not allowed.
            CapacityError: it does not fit into the budget.
        """
        check_task(task, self.name)
        if adapter is None:
            version = self._catalogue.stored(task)
        else:
            loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, base=self._base.base_view)
            version = self._catalogue.held(task, loaded)
        served = False
        try:
            with self._tiers.using([version]):
                self._pins.apply(task, version)
                self._catalogue.put({task: version})
                served = True
                self._pins.apply(task, version)  # it may have been pinned or unpinned meanwhile
        except BaseException:
            if not served:
                self._retire(version)  # else it would stay, pinned for a task that never stood for it
            raise

    def register(self, sources: Mapping[str, Source]) -> None:
        """Know adapters from outside the bundle without reading them: each is read when it is first asked for.

        A task that stands for the same content already goes on as it is; one that is pinned is brought and folded as
        by `load`.

        Args:
            sources: task -> where its adapter is.  A name may also be "TENANT/TASK@VERSION", as the server has them.

        Raises:
            BundleError: a name is not allowed; none is known then.
            AdapterError, CapacityError: one that is pinned cannot be brought; all are known.
        """
        for task in sources:
            if not _REGISTERED.fullmatch(task):
                check_task(task, self.name)
        found = {task: Version(task, source.digest, source.read) for task, source in sources.items()}
        changed = self._catalogue.changed(found)
        self._catalogue.put(changed)
        self._pins.apply_changed(changed)

    def forget(self, tasks: Iterable[str]) -> None:
        """`unload` of several: all of them or, where one is unknown, none.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        names = list(tasks)
        self._catalogue.remove(names)
        self._pins.forget(names)

    def probe(self, task: str) -> bool:
        """Whether a task answers differently from the base on the bundle's own example.

        Raises:
            UnknownTask: there is no such task.
            AdapterError, BundleError, CapacityError: it cannot be served, or an output is not finite.
        """
        version = self._catalogue.adapter(task, "probe")
        example = requests.check_inputs(self._manifest, self._base.example())
        # Both from the bank: a folded session rounds otherwise.
        base = self._engine.run_banked(example, None)
        try:
            own = self._engine.run_banked(example, version)
        except RunError as error:
            if type(error) is not RunError or error.__cause__ is None:
                raise
            # The base ran on the same graph and inputs.
            raise AdapterError(f"probe task {task!r} on the bundle's example", problem=error.problem) from error
        return differs(base, own, task=task)

    def unload(self, task: str) -> None:
        """Stop serving a task; runs in flight finish on it.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        self.forget([task])

    def pin(self, task: str, *, folded: bool = False) -> None:
        """Keep a task resident until `unpin`, whoever else needs room.

        Args:
            task: which.
            folded: also fold it into a session of its own, which costs what the base costs and holds weights of its
                own.  Made in the background; runs go on from the bank and change over when it is ready, which is when
                this returns.

        Raises:
            UnknownTask: there is no such task, or it is the base.
            CapacityError: it does not fit into the budget beside those that are pinned.
            AdapterError, RunError: it cannot be folded; it stays pinned on the bank.
        """
        self._pins.pin(task, folded=folded)

    def unpin(self, task: str) -> None:
        """Let a task leave the device again when others need room, and its own session at once.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        self._pins.unpin(task)

    def prefetch(self, tasks: Iterable[Task]) -> Future[None]:
        """Begin to bring tasks to the device in the background.

        Returns:
            Done once they are there; its exception says which could not be brought.

        Raises:
            UnknownTask: there is no such task.
        """
        versions = [self._catalogue.find(task, doing=f"prefetch task {task!r}") for task in tasks]
        return self._holder.prefetch(version for version in versions if version is not None)

    def close(self) -> None:
        """Let go of sessions and threads, once the runs in flight are done."""
        self._tiers.close()
        self._batcher.close()
        self._holder.close()
        self._folds.close()
        if isinstance(self._session, Captured):
            self._session.close()
        self._release()

    def _found(
        self, inputs: Mapping[str, Array], task: Task | None, tasks: Sequence[Task] | None, ports: Sequence[Port]
    ) -> list[Version | None]:
        """One version for all rows, or one a row: found before anything runs, so that changes do not touch the call."""
        if tasks is None:
            return [self._catalogue.find(BASE_TASK if task is None else task)]
        if task is not None:
            raise InputError("run a batch", expected="task or tasks", got="both")
        requests.check_tasks(self._manifest, tasks, inputs)
        found = [self._catalogue.find(own, doing=f"run task {own!r} for row {row}") for row, own in enumerate(tasks)]
        if found.count(found[0]) < len(found):
            requests.check_apart(self._manifest, ports)
        return found

    def _run_batch(
        self, inputs: Mapping[str, Array], tasks: Sequence[object], options: onnxruntime.RunOptions
    ) -> Outputs:
        """What the batcher runs: versions that are held, or the base by its name."""
        versions = [task if isinstance(task, Version) else None for task in tasks]
        held = list(dict.fromkeys(version for version in versions if version is not None))
        # Never waits for a row: those who hold rows may wait for this very thread.
        if not self._tiers.take_resident(held):
            raise RunError(f"run a batch on bundle {self.name!r}", problem="who asked for a task in it has left")
        try:
            return self._engine.run_held(inputs, versions, options)
        finally:
            self._tiers.give_back(held)

    def _preload(self) -> None:
        for task in self.tasks:
            if self._tiers.full:
                _log.info("%d of %d tasks fit on the device at once", self.usage()["rows_taken"], len(self.tasks))
                return
            self._holder.bring([self._catalogue.adapter(task, "load")])

    def _retire(self, version: Version) -> None:
        self._tiers.retire(version)  # first: whoever folds it looks at this last
        self._folds.drop(version)

    def _lay_out(self, adapter: Adapter) -> Content:
        # By name: a server's clients read what is wrong with their adapters, and where a bundle lies is not theirs.
        name = repr(self._manifest.name)
        filled = fit.fill(self._manifest, adapter, bundle=name, base_value=self._base.base_value)
        rows = self._layout.rows(fit.named(self._manifest, filled))
        return Content(rows, fit.sizes(self._manifest, adapter))

    def _banked_answer(self, inputs: Mapping[str, Array], version: Version | None) -> dict[str, Array]:
        return self._engine.run_banked(inputs, version)

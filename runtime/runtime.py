"""The runtime: one bundle, many tasks, any mixture of them in a batch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, overload

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.bank import Layout
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.task_versions import Task, TaskVersions
from tpeft_deploy.runtime.adapters.version import Content, Version
from tpeft_deploy.runtime.batching.calls import InferOptions
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.batching.policy import Limits, Order
from tpeft_deploy.runtime.batching.stats import BatchingStats
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.component import ServedComponent, queue_orders
from tpeft_deploy.runtime.component_files import ComponentFiles
from tpeft_deploy.runtime.devices.choices import choose_devices
from tpeft_deploy.runtime.devices.spread import open_residencies
from tpeft_deploy.runtime.engine import Outputs
from tpeft_deploy.runtime.generation.orders import SequenceOrder
from tpeft_deploy.runtime.pins import Pins
from tpeft_deploy.runtime.served_generation import ServedGeneration
from tpeft_deploy.runtime.served_tasks import ServedTasks
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import Cuda
from tpeft_deploy.tucker import Array

__all__ = ["Runtime"]

GIB = 2**30


class Runtime(ServedGeneration, ServedTasks):
    """Serves the tasks of a bundle, on each of its components; safe to call from several threads.

    Every digest is checked before anything is served.

    Args:
        bundle: a bundle's directory.
        provider: "cuda", "cuda:1" for the second device, "cpu", "openvino", "tensorrt", or "auto": CUDA where it works,
            else the CPU; `provider` and `provider_reason` say which and why.
        devices: numbers of the devices to serve on, [0, 1]; by default the one that `provider` names.  Each has
            sessions and a bank, with budgets of the sizes below.  A task lives on one, on several while much of the
            work is on it, and on all while it is pinned.  Sequences are generated on the first.  On the CPU, each
            number stands for separate sessions and a separate bank.
        threads: intra-op threads of each session; by default one per core.
        device_bytes: bytes for adapters on the device.  The least used are evicted; pinned ones stay.
            While the bank grows, the old one lives until its runs are done.
        host_bytes: bytes for copies of adapters in host memory, so that evicted ones return to the device without
            being read again; by default 1 GiB on CUDA, none on the CPU.
        folded_bytes: bytes for sessions of hot tasks: the tasks that most rows ask for are folded in the background
            as far as this goes, and unfolded when others are hotter.  `pin(task, folded=True)` needs no budget.
        session_bytes: bytes for the weights and intermediate results of each session on CUDA; by default all memory.
        allow_tf32: on CUDA, compute float32 products in TF32: faster, with errors up to 2e-3.  All runtimes of a
            process have to agree, as NVIDIA's libraries read the setting once.
        cuda_graphs: on CUDA, record runs of the bank as CUDA graphs, one for each shape that comes again; inputs are
            filled up to a few shapes for it (see `captured`).
        pinned_share: part of the rows that `device_bytes` has room for, the base's not counted, which pinned tasks may
            take; they give way where adapters of larger ranks leave fewer rows.
        limits: how requests of `infer` are joined and how many may wait; 32 rows and 2 ms by default.
        order: which of the requests that wait is next; first come, first served by default.  A bundle of several
            components, each of which has a queue, needs a function: component -> order.
        preload: bring the bundle's tasks to the device now, by name, as far as there is room; else each when it is
            first asked for.
        kv_bytes: bytes for the caches of sequences; by default those of 8, 256 MiB at most.  Taken with the first.
        max_tokens: tokens of a prompt and what is generated for it; 2,048 by default, if the model can.
        max_source: positions of an encoder's result for one sequence; the model's by default, or 512 without a bound.
        prefix_bytes: bytes of host memory for caches of known beginnings of prompts.
        sequence_order: order and shares of tenants in slots and in the computation of prompts; first come by default.
        own_copy: serve from a copy of graphs and weights in the directory for temporary files, which goes with the
            runtime.  Without, ONNX Runtime maps the bundle's weights.data: writing to it changes answers,
            truncating it kills the process.

    Raises:
        BundleError: the directory is not a bundle, or something in it was altered.
        ProviderUnavailable: a provider that was asked for, or one of the devices, cannot be used for this bundle.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        provider: str = "auto",
        devices: Sequence[int] | None = None,
        threads: int | None = None,
        device_bytes: int = GIB,
        host_bytes: int | None = None,
        folded_bytes: int = 0,
        session_bytes: int | None = None,
        cuda_graphs: bool = False,
        allow_tf32: bool = False,
        pinned_share: float = 1.0,
        limits: Limits | None = None,
        order: Order[Form] | Callable[[str], Order[Form]] | None = None,
        preload: bool = True,
        own_copy: bool = True,
        kv_bytes: int | None = None,
        max_tokens: int | None = None,
        max_source: int | None = None,
        prefix_bytes: int = 64 * 2**20,
        sequence_order: SequenceOrder | None = None,
    ) -> None:
        choices = choose_devices(provider, devices, allow_tf32=allow_tf32)
        choice = choices[0]
        self.provider = choice.provider
        self.provider_reason = "; ".join(dict.fromkeys(own.reason for own in choices))
        # Resolved, as tasks are read later, wherever the process has gone.
        self._bundle = Bundle.open(Path(bundle).resolve())
        cuda = Cuda(memory_bytes=session_bytes, graphs=cuda_graphs, tf32=allow_tf32 and choice.device != "cpu")
        limits = Limits() if limits is None else limits
        orders = queue_orders(self._bundle, order)
        opened = ExitStack()
        self._release = weakref.finalize(self, opened.close)  # also where the runtime is never closed
        with ExitStack() as failed:  # not left to the collector: the exception refers to this object
            failed.callback(self._release)
            files = {
                name: ComponentFiles.open(own, choice.provider, own_copy=own_copy, opened=opened)
                for name, own in self._bundle.components.items()
            }
            self._devices, self._placed = open_residencies(
                Layout.joined({name: own.layout for name, own in files.items()}),
                self._lay_out,
                [own.device for own in choices],
                device_bytes=device_bytes,
                host_bytes=host_bytes,
                pinned_share=pinned_share,
            )
            self._versions = TaskVersions(self._bundle, self._retire)
            self._loader = AdapterLoader(self._placed, limits.max_queue_rows)
            self._residency = first = self._devices[0]  # where sequences are generated
            self._first_loader = self._loader if first is self._placed else AdapterLoader(first)
            self._components: dict[str, ServedComponent] = {}
            self._parts = self._components.values()
            # Divided by weights: a budget for the sessions of one task holds one in every component.
            weights = {name: own.bundle.manifest.weight_bytes for name, own in files.items()}
            for name, own in files.items():
                component = self._components[name] = ServedComponent(
                    name if len(files) > 1 else "",
                    own,
                    [SessionFactory.of(own.bundle.manifest, one, threads=threads, cuda=cuda) for one in choices],
                    self._devices,
                    self._placed,
                    self._loader,
                    limits,
                    orders[name],
                    folded_bytes * weights[name] // max(sum(weights.values()), 1),
                )
                failed.callback(component.close_sessions)
                if component.replicas[0].remark:
                    self.provider_reason += f"; {component.replicas[0].remark}"
            self._only = component if len(files) == 1 else None
            served = {name: own.bundle for name, own in files.items()}
            self._base = replace(self._bundle, parts=served) if len(files) > 1 else component.bundle
            self._pins = Pins(self._versions, self._placed, self._parts)
            self._generation = self._open_generation(
                first, choice.device, kv_bytes, max_tokens, max_source, prefix_bytes, sequence_order
            )
            self._prepare(preload=preload)
            failed.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def usage(self, device: int | None = None) -> dict[str, int]:
        """Bytes that adapters and sequences take: `device_bytes`, `host_bytes`, `folded_bytes`; `rows_taken` of `rows`.

        `device_bytes` is the bank, the sum of `device_adapter_bytes`, what the adapters on the device hold, and
        `device_reserved_bytes`: the base's row, padding to the largest ranks, and rows that wait for an adapter.
        Where the bundle has a decoder: `kv_bytes` of the caches of `slots` sequences, `slots_taken`, `prefix_bytes`,
        and `slot_adapter_bytes` of the copies of adapters that steps of a decoder read.

        Args:
            device: index in `devices`; by default the sum of all.

        Raises:
            InputError: there is no such device.
        """
        shown = range(len(self._devices)) if device is None else [device]
        if shown[0] not in range(len(self._devices)):
            raise InputError("look at a device", expected=f"an index below {len(self._devices)}", got=device)
        folded = sum(own.replicas[place].folds.nbytes for own in self._parts for place in shown)
        residency = self._placed if device is None else self._devices[device]
        generation = self._generation.usage() if 0 in shown else {}
        return residency.usage() | {"folded_bytes": folded} | generation

    def batching(self, component: str | None = None) -> BatchingStats:
        """What `infer` has joined and refused so far, and what waits; of all components by default."""
        parts = self._parts if component is None else [self._part(component)]
        return BatchingStats.total([own.batcher.figures() for own in parts])

    @property
    def components(self) -> list[str]:
        """The bundle's components, in the order of its export; `model` where there is one graph."""
        return list(self._components)

    @overload
    def run(
        self,
        inputs: Mapping[str, object],
        task: Task = BASE_TASK,
        *,
        outputs: Sequence[str] | None = None,
        component: str | None = None,
    ) -> dict[str, Array]: ...

    @overload
    def run(
        self,
        inputs: Mapping[str, object],
        *,
        tasks: Sequence[Task],
        outputs: Sequence[str] | None = None,
        component: str | None = None,
    ) -> Outputs: ...

    def run(
        self,
        inputs: Mapping[str, object],
        task: Task | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        outputs: Sequence[str] | None = None,
        component: str | None = None,
    ) -> dict[str, Array] | Outputs:
        """Run a batch, in one run however many rows it has: at once, beside the requests of `infer`.

        Args:
            inputs: input name -> array; the first axis is the batch.
            task: one task for all rows, or a weighted set of tasks, {"style": 0.7, "domain": 1.0}; the base when
                neither `task` nor `tasks` is given.
            tasks: one task (or set) per row; `base` is a task too.
            outputs: names of those to return; all by default.  Rows of different tasks have none that depends on the
                batch as a whole, as scores of every row against every other do.
            component: name of the graph to run, where the bundle has several.

        Returns:
            Output name -> array.  With `tasks`, an output with a size per task is a list of arrays, one a
            row, each of the size of its task.

        Raises:
            UnknownTask: there is no such task; the message names its row.
            InputError: an input does not fit the model, tasks do not fit the rows, there is no such output, or rows of
                different tasks do not have it, or the component is none of the bundle's; nothing has run.
            CompositionError: a set has no exact sum.
            AdapterError, BundleError: a task that was not resident cannot be read.
            CapacityError: a task does not fit into the budget beside those that are pinned.
        """
        part = self._only if component is None and self._only is not None else self._part(component)
        arrays = requests.check_inputs(part.manifest, inputs)
        ports = requests.check_outputs(part.manifest, outputs)
        versions = self._found(part.manifest, arrays, task, tasks, ports)
        replica = part.replica(versions)
        if tasks is None:
            whole = replica.engine.run_one(arrays, replica.own(versions)[0])
            return {port.name: whole[port.name] for port in ports}
        found = replica.engine.run_rows(arrays, replica.own(versions))
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
        component: str | None = None,
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
        component: str | None = None,
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
        component: str | None = None,
    ) -> dict[str, Array] | Outputs:
        """Run a request together with those of others, of any task: what `run` answers, later by a few milliseconds.

        Requests are joined where their other axes are equal, or where the manifest says what they may be filled up
        with.  Cancelling takes the request out of its batch, and stops the run once no caller waits for it.  A request
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
            component: name of the graph to run, as for `run`.

        Raises:
            UnknownTask, InputError, CompositionError, AdapterError, BundleError, CapacityError: as `run`.
            TooLarge: it is more than the limits of a request allow; none are set by default.
            QueueFull: too many rows wait already.
            DeadlineExceeded: the time was over first.
            TpeftError: as raised by the order of the queue, which refuses it.
        """
        part = self._only if component is None and self._only is not None else self._part(component)
        arrays = requests.check_inputs(part.manifest, inputs)
        ports = requests.check_outputs(part.manifest, outputs)
        versions = self._found(part.manifest, arrays, task, tasks, ports)
        return await part.dispatcher.infer(
            arrays, versions, InferOptions(ports, tasks is not None, timeout, tenant, priority, timing)
        )

    def close(self) -> None:
        """Release sessions and threads, once the runs in flight are done; sequences end with an error."""
        self._placed.close()
        self._generation.close()
        for component in self._parts:
            component.batcher.close()
        self._loader.close()
        self._first_loader.close()
        for component in self._parts:
            component.close_sessions()
        self._release()

    def _part(self, component: str | None) -> ServedComponent:
        if component is None and self._only is not None:
            return self._only
        found = None if component is None else self._components.get(component)
        if found is None:
            raise InputError(
                f"run bundle {self.name!r}",
                expected=f"component= one of {', '.join(map(repr, self._components))}",
                got="none" if component is None else repr(component),
            )
        return found

    def _found(
        self,
        manifest: Manifest,
        inputs: Mapping[str, Array],
        task: Task | None,
        tasks: Sequence[Task] | None,
        ports: Sequence[Port],
    ) -> list[Version]:
        """Return one version for all rows, or one a row, found once before anything runs."""
        if tasks is None:
            return [self._versions.find(BASE_TASK if task is None else task)]
        if task is not None:
            raise InputError("run a batch", expected="task or tasks", got="both")
        requests.check_tasks(manifest, tasks, inputs)
        found = [self._versions.find(own, doing=f"run task {own!r} for row {row}") for row, own in enumerate(tasks)]
        if found.count(found[0]) < len(found):
            requests.check_apart(manifest, ports)
        return found

    def _lay_out(self, adapter: Adapter) -> Content:
        # By name: a server's clients see these errors, and may not learn the bundle's path.
        name = repr(self.name)
        self._bundle.check_taken(adapter, bundle=name)
        contents = [component.lay_out(adapter, bundle=name) for component in self._parts]
        return contents[0] if len(contents) == 1 else Content.joined(contents)

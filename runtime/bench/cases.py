"""The ways of running one batch that are measured against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, cycle

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import AdapterError, InputError, RunError, TpeftError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.bench.measure import Case
from tpeft_deploy.runtime.runtime import Runtime
from tpeft_deploy.runtime.sessions.providers import DEFAULT_CUDA, Choice, Cuda, open_session
from tpeft_deploy.runtime.sessions.served_graphs import factored_graph
from tpeft_deploy.tucker import Array

__all__ = ["CASES", "PlainSessions", "batch", "fold_copy", "free_name", "known_tasks", "served", "taking_turns"]

CASES = {
    "plain": "base.onnx in a bare session",
    "base": "the base through the runtime",
    "folded": "a hot task in a folded session",
    "factored": "one task's factors bound to the factored graph",
    "banked": "the same task run after run",
    "switched": "another task every run",
    "mixed": "rows of different tasks in one run",
    "singles": "the rows of mixed, each in a separate run",
}


class PlainSessions:
    """The bundle's graphs without the runtime: sessions with the same options.

    Args:
        bundle: bundle; its files are checked against their digests.
        choice: the device.
        threads: intra-op threads; by default one per core.
        cuda: options of the sessions on CUDA.
    """

    def __init__(self, bundle: Bundle, choice: Choice, threads: int | None, cuda: Cuda = DEFAULT_CUDA) -> None:
        self._bundle, self._choice, self._threads, self._cuda = bundle, choice, threads, cuda
        self._base = self._open("base.onnx")
        self._factored: onnxruntime.InferenceSession | None = None

    @property
    def has_factored(self) -> bool:
        """Whether the provider runs graphs that take factors as overridable initializers."""
        return not self._choice.execution.compiles

    def base(self, inputs: Mapping[str, Array]) -> Case:
        """A bare run of the base."""
        return lambda: self._base.run(None, inputs)

    def factored(self, task: str, inputs: Mapping[str, Array]) -> Case:
        """A run of the factored graph with a task's factors bound beforehand."""
        file = factored_graph(self._choice.provider, self._bundle.manifest)
        if self._factored is None:
            self._factored = self._open(file)
        session, device = self._factored, device_lock.place(self._choice.device)
        binding = session.io_binding()
        for name, array in self._bundle.factors(task, file).items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *device)
            binding.bind_ortvalue_input(name, value)
        outputs = [output.name for output in session.get_outputs()]

        def run() -> object:
            for name, array in inputs.items():
                binding.bind_cpu_input(name, array)
            binding.clear_binding_outputs()
            for name in outputs:
                binding.bind_output(name, *device)
            session.run_with_iobinding(binding)
            return binding.copy_outputs_to_cpu()

        return run

    def _open(self, file: str) -> onnxruntime.InferenceSession:
        half = any(weight.dtype == "float16" for weight in self._bundle.manifest.weights.values())
        path = self._bundle.check_file(file)
        return open_session(path, self._choice, threads=self._threads, half=half, cuda=self._cuda)


def batch(bundle: Bundle, rows: int) -> dict[str, Array]:
    """The bundle's example inputs, repeated and cut to a number of rows.

    Raises:
        InputError: the model takes another number of rows only.
        IntegrityError: the example cannot be read.
    """
    manifest = bundle.manifest
    free = {port.name for port in requests.batched(manifest, manifest.inputs)} if manifest.batch_axis else set()
    inputs = {
        name: np.asarray(array[np.arange(rows) % len(array)] if name in free else array, order="C")
        for name, array in bundle.example().items()
    }
    if not free and rows != (own := max(len(array) for array in inputs.values() if array.ndim)):
        raise InputError(f"measure bundle {manifest.name!r}", expected=f"--rows {own}, all it takes", got=rows)
    return inputs


def fold_copy(bundle: Bundle, runtime: Runtime) -> str | TpeftError | None:
    """Let the runtime fold a copy of the first task, which leaves the task itself on the bank.

    Returns:
        The copy's name, or why it cannot be folded; None where the bundle has no task.
    """
    first = next(iter(bundle.tasks), None)
    if first is None:
        return None
    name = free_name(bundle, f"{first[:100]}-folded")
    runtime.load(name, bundle.adapter(first))
    try:
        runtime.pin(name, folded=True)
    except (AdapterError, RunError) as error:
        runtime.unload(name)
        return error
    return name


def free_name(bundle: Bundle, name: str) -> str:
    """A name that no task of the bundle has, with a number where it must."""
    taken = {*bundle.tasks, bundle.manifest.name}
    return name if name not in taken else next(own for n in count() if (own := f"{name}-{n}") not in taken)


def served(
    bundle: Bundle,
    runtime: Runtime,
    plain: PlainSessions,
    tasks: Sequence[str],
    folded: str | None,
    rows: int,
    component: str | None = None,
) -> dict[str, Case]:
    """The cases for a number of rows.

    Args:
        bundle: bundle of the component, which gives the example inputs.
        runtime: serves the tasks.
        plain: the sessions to compare with.
        tasks: that take turns; where there is only the base, what needs a task is not among the cases.
        folded: a task with a folded session, or None.
        rows: rows of a batch.
        component: component that runs.
    """
    inputs = batch(bundle, rows)
    run = partial(runtime.run, component=component)
    cases: dict[str, Case] = {"plain": plain.base(inputs), "base": lambda: run(inputs)}
    own = [task for task in tasks if task in bundle.tasks]
    if not own:
        return cases
    if folded is not None:
        cases["folded"] = lambda: run(inputs, folded)
    if runtime.only_folded:
        return cases
    if plain.has_factored:
        cases["factored"] = plain.factored(own[0], inputs)
    cases |= {
        "banked": lambda: run(inputs, own[0]),
        "switched": taking_turns(runtime, tasks, inputs, component),
    }
    if rows == 1 or not bundle.manifest.batch_axis:
        return cases
    apart = [port.name for port in bundle.manifest.outputs if port.rows != "joint"]
    mixed = [task for task, _ in zip(cycle(tasks), range(rows), strict=False)]
    single = [requests.take_rows(bundle.manifest, inputs, np.array([row])) for row in range(rows)]

    def singles() -> None:
        for row, task in zip(single, mixed, strict=True):
            run(row, task)

    return cases | {"mixed": lambda: run(inputs, tasks=mixed, outputs=apart), "singles": singles}


def taking_turns(
    runtime: Runtime, tasks: Sequence[str], inputs: Mapping[str, Array], component: str | None = None
) -> Case:
    """A run of the next task, every time."""
    turns: Iterator[str] = cycle(tasks)
    return lambda: runtime.run(inputs, next(turns), component=component)


def known_tasks(bundle: Bundle, most: int) -> list[str]:
    """Tasks to take turns: the bundle's first ones, the base beside them where there is one or none."""
    tasks = list(bundle.tasks)[:most]
    return tasks if len(tasks) > 1 else [*tasks, "base"]

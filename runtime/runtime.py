"""The face of the runtime: one bundle, many tasks, any mixture of them in a batch."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import BANKED_CPU, BASE_TASK, Bundle, check_task
from tpeft_deploy.errors import InputError, ProviderUnavailable, UnknownTask
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.runtime import requests
from tpeft_deploy.runtime.bank import Bank, Resident, build, make_resident
from tpeft_deploy.runtime.providers import ORT_ERRORS, Choice, choose
from tpeft_deploy.runtime.session import Session
from tpeft_deploy.tucker import Array

__all__ = ["Runtime"]

_log = logging.getLogger("tpeft_deploy.runtime")


class Runtime:
    """Serves the tasks of a bundle; safe to call from several threads.

    Every digest is checked before anything is served.  All tasks of the bundle are resident from the start.

    Args:
        bundle: a bundle's directory.
        provider: "cuda", "cpu", or "auto": CUDA where it works, else the CPU; `provider` and `provider_reason` say
            which and why.
        threads: intra-op threads of the session; by default one per core.

    Raises:
        BundleError: the directory is not a bundle, or something in it was altered.
        ProviderUnavailable: CUDA was asked for by name and cannot be used.
    """

    def __init__(self, bundle: str | os.PathLike[str], *, provider: str = "auto", threads: int | None = None) -> None:
        choice = choose(provider)
        self.provider = choice.device
        self.provider_reason = choice.reason
        self._bundle = Bundle.open(bundle)
        self._bundle.check_file("weights.data")
        residents = {BASE_TASK: make_resident(self._bundle, None, None)}
        for task, digest in self._bundle.tasks.items():
            residents[task] = make_resident(self._bundle, self._bundle.adapter(task), digest)
        self._changes = threading.Lock()
        self._bank = build(self._bundle, residents, choice.device)
        self._session = self._open(choice, threads)

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self._bundle.manifest.name

    @property
    def tasks(self) -> list[str]:
        """The tasks that can be run, without `base`."""
        return sorted(set(self._bank.residents) - {BASE_TASK})

    @overload
    def run(self, inputs: Mapping[str, object], task: str = BASE_TASK) -> dict[str, Array]: ...

    @overload
    def run(self, inputs: Mapping[str, object], *, tasks: Sequence[str]) -> dict[str, Array | list[Array]]: ...

    def run(
        self, inputs: Mapping[str, object], task: str | None = None, *, tasks: Sequence[str] | None = None
    ) -> dict[str, Array] | dict[str, Array | list[Array]]:
        """Run a batch.

        Args:
            inputs: input name -> array; the first axis is the batch.
            task: one task for all rows; the base when neither `task` nor `tasks` is given.
            tasks: one task per row; `base` is a task too.

        Returns:
            Output name -> array.  With `tasks`, an output whose size varies per task is a list of arrays, one a
            row, each with its own task's size.

        Raises:
            UnknownTask: a task is not resident; the message names its row.
            InputError: an input does not fit the model, or tasks do not fit the rows; nothing has run.
        """
        bank = self._bank  # one snapshot for the whole call: a load or unload meanwhile does not touch it
        arrays = requests.check_inputs(self._bundle.manifest, inputs)
        if tasks is None:
            return self._run_one(bank, arrays, BASE_TASK if task is None else task)
        if task is not None:
            raise InputError("run a batch", expected="task or tasks", got="both")
        requests.check_tasks(self._bundle.manifest, tasks, arrays)
        index = np.array([self._row(bank, name, row) for row, name in enumerate(tasks)], np.int64)
        if self._bundle.manifest.rows == "group":
            return self._run_groups(bank, arrays, tasks)
        outputs = self._session.run(bank, arrays, index)
        return self._split(bank, outputs, tasks)

    def load(self, task: str, adapter: str | os.PathLike[str] | Adapter) -> None:
        """Make an adapter resident, in place of an earlier one of that name; the bundle on disk stays as it is.

        Args:
            task: the name to serve it under.
            adapter: what `load_adapter` takes, or an adapter.

        Raises:
            AdapterError: it cannot be read or does not fit; the old one goes on being served.
            BundleError: the name is not allowed.
        """
        check_task(task, self.name)
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, base=self._bundle.base_view)
        resident = make_resident(self._bundle, loaded, None)
        with self._changes:
            self._replace({**self._bank.residents, task: resident})

    def unload(self, task: str) -> None:
        """Stop serving a task; runs in flight finish on it.

        Raises:
            UnknownTask: it is not resident, or it is the base.
        """
        with self._changes:
            residents = dict(self._bank.residents)
            if task == BASE_TASK or task not in residents:
                raise UnknownTask(f"unload task {task!r}", expected=f"one of {', '.join(self.tasks)}", got=repr(task))
            del residents[task]
            self._replace(residents)

    def _open(self, choice: Choice, threads: int | None) -> Session:
        manifest = self._bundle.manifest
        dtypes = {weight.dtype for weight in manifest.weights.values()}
        if choice.device == "cpu" and "bfloat16" in dtypes:
            raise ProviderUnavailable(
                f"open bundle {manifest.name!r}, whose weights are bfloat16, on the CPU",
                expected="CUDA: ONNX Runtime's CPU cannot compute in bfloat16",
                got=self.provider_reason,
                fix="Export the module with .float() or .half() for the CPU.",
            )
        half = "float16" in dtypes
        if choice.device == "cpu" and BANKED_CPU in manifest.files:
            try:
                return Session(self._bundle.check_file(BANKED_CPU), choice, threads=threads, half=half)
            except ORT_ERRORS as error:
                # Internal operators of ONNX Runtime, which a build of it may lack; the portable graph says the same.
                self.provider_reason += f"; {BANKED_CPU} not used ({str(error).splitlines()[0][:160]})"
                _log.warning("bundle %r: %s", manifest.name, self.provider_reason)
        return Session(self._bundle.check_file("banked.onnx"), choice, threads=threads, half=half)

    def _replace(self, residents: Mapping[str, Resident]) -> None:
        self._bank = build(self._bundle, residents, self.provider)

    def _row(self, bank: Bank, task: str, row: int) -> int:
        try:
            return bank.row(task)
        except UnknownTask as error:
            error.doing = f"run task {task!r} for row {row}"
            raise

    def _run_one(self, bank: Bank, arrays: Mapping[str, Array], task: str) -> dict[str, Array]:
        outputs = self._session.run(bank, arrays, np.array([bank.row(task)]))
        sizes = bank.residents[task].sizes
        ports = self._bundle.manifest.outputs
        return {port.name: requests.cut(port, outputs[port.name], sizes.get(port.name, 0)) for port in ports}

    def _run_groups(
        self, bank: Bank, arrays: Mapping[str, Array], tasks: Sequence[str]
    ) -> dict[str, Array | list[Array]]:
        """One run per task, for models that cannot serve rows of different adapters in one."""
        manifest = self._bundle.manifest
        rows: dict[str, list[Array | None]] = {port.name: [None] * len(tasks) for port in manifest.outputs}
        for task in dict.fromkeys(tasks):
            chosen = np.flatnonzero([name == task for name in tasks])
            outputs = self._run_one(bank, requests.take_rows(manifest, arrays, chosen), task)
            for name, array in outputs.items():
                for place, own in zip(chosen, array, strict=True):
                    rows[name][place] = own
        return {
            port.name: list(rows[port.name]) if port.varies else np.stack(rows[port.name])  # type: ignore[arg-type]
            for port in manifest.outputs
        }

    def _split(self, bank: Bank, outputs: Mapping[str, Array], tasks: Sequence[str]) -> dict[str, Array | list[Array]]:
        split: dict[str, Array | list[Array]] = {}
        for port in self._bundle.manifest.outputs:
            array = outputs[port.name]
            if port.varies is None:
                split[port.name] = array
                continue
            sizes = [bank.residents[task].sizes[port.name] for task in tasks]
            # Axis 0 is the batch; a row on its own has one axis less.
            row_axis = port.varies.axis - 1
            split[port.name] = [own.take(range(size), axis=row_axis) for own, size in zip(array, sizes, strict=True)]
        return split

"""The training library as an oracle: what it computes with an adapter's own file, not merged.

Comparing an export with the merged base proves that the graphs are what was read.  Only the library that trained the
adapter can prove that it was read as it was meant, so wherever it can read the file it is asked too.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tpeft_deploy.adapter import Adapter, Origin
from tpeft_deploy.exporters.bases import dotted_names
from tpeft_deploy.exporters.oracle import compare, lycoris, peft
from tpeft_deploy.exporters.oracle.base import Base, Inputs, Outputs
from tpeft_deploy.exporters.oracle.compare import MERGED, Check
from tpeft_deploy.exporters.oracle.limits import ErrorLimits
from tpeft_deploy.exporters.oracle.quiet import quiet
from tpeft_deploy.exporters.oracle.subject import Sizes, Subject

__all__ = ["Evidence", "Sources"]

_log = logging.getLogger("tpeft_deploy.exporters")

_LIBRARIES: Mapping[str, ModuleType] = {"peft": peft, "safetensors": lycoris}
_HALVES = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Evidence:
    """Evidence that an adapter was read correctly.

    Args:
        oracle: the library and its version, "peft 0.21.2"; "merged" where the merged base is all there is.
        reason: why it is all there is; empty otherwise.
        outputs: the library's, with the free sizes that they were computed at; empty where there is none.
    """

    oracle: str
    reason: str = ""
    outputs: Sequence[tuple[Sizes, Outputs]] = ()

    def measure(
        self,
        form: str,
        task: str,
        sizes: Sizes,
        answer: Callable[[], Outputs],
        expected: Outputs,
        limit: ErrorLimits,
    ) -> Iterator[Check]:
        """Compare a run with the merged base, and with the library where it ran at these sizes.

        Args:
            form: form that is run, as for `compare.measure`.
            task: the task that was run.
            sizes: free sizes of the inputs.
            answer: runs the form, once.
            expected: the merged base's outputs.
            limit: relative error allowed.
        """
        answer = cache(answer)
        yield compare.measure(form, task, sizes, answer, expected, limit)
        for own, outputs in self.outputs:
            if own == sizes:
                yield compare.measure(form, task, sizes, answer, outputs, limit, self.oracle)


class Sources:
    """The sources of the tasks of one base, each run once.

    Args:
        subject: base of all adapters.
        keep: whether outputs are kept after they were given once.
        whole: task -> whole adapter, where the base is a component that takes a part of it.
    """

    def __init__(self, subject: Subject, *, keep: bool = False, whole: Mapping[str, Adapter] | None = None) -> None:
        self.subject = subject
        self._whole = whole or {}
        self._keep = keep
        self._found: dict[str, Evidence] = {}

    def of(self, task: str, adapter: Adapter | None) -> Evidence:
        """The source of a task; None is the base itself, which nothing was read for."""
        if adapter is None:
            return Evidence(MERGED)
        if task in self._found:
            return self._found[task]
        source = _ask(self.subject, adapter, self._whole.get(task, adapter))
        self._found[task] = source if self._keep else replace(source, outputs=())
        return source

    def to_json(self, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Records for a manifest: task -> its oracle, with no error yet.

        Args:
            digests: task -> digest of the adapter that the record is about.
        """
        return {
            task: {"oracle": source.oracle, "reason": source.reason, "error": 0.0, "digest": digests[task]}
            for task, source in self._found.items()
        }


def _ask(subject: Subject, part: Adapter, adapter: Adapter) -> Evidence:
    """Ask the library that wrote an adapter.

    Args:
        subject: base.
        part: changes of the base's weights.
        adapter: the whole adapter, of which `part` is what the base takes.
    """
    base, origin = subject.base, adapter.origin
    if origin is None:
        return Evidence(MERGED, "made in memory, or read from a file that no training library reads")
    if origin.part:
        return Evidence(
            MERGED, f"the base is part {origin.part!r} of the model that was trained, and a library needs all of it"
        )
    if base.module is None:
        return Evidence(MERGED, f"base {base.name} is no torch module, and no training library runs another")
    library = _LIBRARIES[origin.family]
    try:
        oracle = f"{library.DISTRIBUTION.partition('-')[0]} {version(library.DISTRIBUTION)}"
    except PackageNotFoundError:
        return Evidence(MERGED, f"{library.DISTRIBUTION} is not installed")
    try:
        with _apart():
            outputs = _answers(library, subject, adapter, origin)
            if base.floating is not None and not _agree(subject, part, outputs):
                before = Subject(base.floating, subject.graph)
                if _agree(before, part, _answers(library, before, adapter, origin)):
                    reason = f"{oracle} derives its changes from the weights: it agrees before they are quantised"
                    return Evidence(MERGED, reason)
    except Exception as error:  # libraries and models raise every kind of exception
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        reason = f"{oracle} cannot be asked about {origin.path}: {' '.join(what.split())[:300]}"
        _log.warning("compare only with the merged base: %s", reason)
        return Evidence(MERGED, reason)
    return Evidence(oracle, "", outputs)


def _answers(library: ModuleType, subject: Subject, adapter: Adapter, origin: Origin) -> list[tuple[Sizes, Outputs]]:
    module = subject.base.module
    if module is None:
        raise TypeError(f"base {subject.base.name} has no torch module")
    forward = library.load(_copy(module, adapter), origin.path)
    return [(sizes, _run(forward, subject.base, subject.inputs(sizes), subject.outputs)) for sizes in subject.shapes]


def _agree(subject: Subject, adapter: Adapter, outputs: Sequence[tuple[Sizes, Outputs]]) -> bool:
    """Whether the merged base computes what a library does."""
    return all(
        compare.measure(MERGED, "", sizes, partial(subject.reference, adapter, sizes), expected).failure is None
        for sizes, expected in outputs
    )


def _copy(module: nn.Module, adapter: Adapter) -> nn.Module:
    """A base for a library to change: in float32 where it has 16 bits, with heads of the task's own size."""
    model = deepcopy(module).eval()
    if _is_half(model):
        model = model.float()
    for name, array in adapter.served_overrides.items():
        owner, _, leaf = name.rpartition(".")
        place = model.get_submodule(owner)
        own = getattr(place, leaf)
        if own.shape != array.shape:
            # Not a number until the library has loaded the task's values.
            setattr(place, leaf, nn.Parameter(torch.full(array.shape, torch.nan, dtype=own.dtype)))
    return model


def _is_half(module: nn.Module) -> bool:
    return any(tensor.dtype in _HALVES for tensor in module.state_dict().values())


def _run(forward: Callable[..., object], base: Base, inputs: Inputs, names: Sequence[str]) -> Outputs:
    tensors = {base.own_names.get(name, name): torch.from_numpy(np.array(array)) for name, array in inputs.items()}
    if base.module is not None and _is_half(base.module):
        tensors = {name: own.float() if own.dtype in _HALVES else own for name, own in tensors.items()}
    outputs = forward(**dotted_names.nest(tensors))
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}


@contextmanager
def _apart() -> Iterator[None]:
    """Without gradients, remarks and a trace in torch's random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

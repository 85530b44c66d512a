"""Resolution of a request's names to the target of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.errors import NotFound, ProtocolError
from tpeft_deploy.runtime.server.v2.messages import BASE, InferRequest, Target
from tpeft_deploy.runtime.server.v2.metadata import ADAPTER_INPUT
from tpeft_deploy.tucker import Array

__all__ = ["Lookup", "Resolved", "resolve"]


class Lookup(Protocol):
    """Resolves a model name for a tenant."""

    def __call__(self, tenant: str, name: str, version: str) -> Target:
        """Return the target.

        Raises:
            NotFound: no visible task has that name and version.
        """


class Resolved(NamedTuple):
    """Targets of a request: one for all rows, or one per row."""

    targets: Sequence[Target]
    per_row: bool


def resolve(find: Lookup, bundle: str, tenant: str, request: InferRequest) -> Resolved:
    """Resolve the targets of a request.

    A task name selects that task; the bundle's name and `base` use the parameter (or header) `adapter`, and the
    bundle's name also the input `adapter`. Conflicting names are refused, and so is the bundle's name without an
    adapter: the base's output could be mistaken for the task's.

    Raises:
        ProtocolError: no adapter, two different ones, or an invalid input `adapter`.
        NotFound: a task is not visible to the tenant; the error names the row if there are several.
    """
    if request.model != bundle:
        return Resolved([_single(find, tenant, request)], per_row=False)
    _check_version(request)
    rows = request.inputs.get(ADAPTER_INPUT)
    if rows is None:
        if request.adapter is None:
            raise ProtocolError(
                f"run model {bundle!r}",
                expected=f"an input {ADAPTER_INPUT!r} of datatype BYTES, or a parameter of that name",
                got="neither",
                fix=f"Name a task for all rows or one for each; {BASE_TASK!r} is the model without adapter.",
            )
        return Resolved([_named(find, tenant, request.adapter)], per_row=False)
    names = _names(bundle, rows)
    if request.adapter is not None and set(names) != {request.adapter}:
        raise _disagreement(request, f"input {ADAPTER_INPUT!r} with {', '.join(sorted(set(names))[:4])}")
    known: dict[str, Target] = {}
    for row, name in enumerate(names):
        if name not in known:
            known[name] = _named(find, tenant, name, row if len(names) > 1 else None)
    return Resolved([known[name] for name in names], per_row=len(names) > 1)


def _single(find: Lookup, tenant: str, request: InferRequest) -> Target:
    if request.model == BASE_TASK:
        _check_version(request)
        return BASE if request.adapter is None else _named(find, tenant, request.adapter)
    found = find(tenant, request.model, request.version)
    if request.adapter is not None and request.adapter != request.model:
        raise _disagreement(request, f"model {request.model!r}")
    return found


def _named(find: Lookup, tenant: str, name: str, row: int | None = None) -> Target:
    """Resolve `name` or `name@version`."""
    if name == BASE_TASK:
        return BASE
    task, _, version = name.partition("@")
    try:
        return find(tenant, task, version)
    except NotFound as error:
        if row is None:
            raise
        raise NotFound(f"run row {row}", problem=str(error)) from error


def _names(bundle: str, rows: Array) -> list[str]:
    if rows.ndim != 1 or rows.dtype != object or not rows.size:
        raise ProtocolError(
            f"run model {bundle!r}, input {ADAPTER_INPUT!r}",
            expected="BYTES of shape [1], or [B] with one name per row",
            got=f"{'BYTES' if rows.dtype == object else rows.dtype} of shape {list(rows.shape)}",
        )
    try:
        return [name.decode() for name in rows]
    except UnicodeDecodeError:
        raise ProtocolError(
            f"run model {bundle!r}, input {ADAPTER_INPUT!r}", expected="names in UTF-8", got="other bytes"
        ) from None


def _check_version(request: InferRequest) -> None:
    if request.version not in {"", "1"}:
        raise NotFound(f"run model {request.model!r}", expected="version 1", got=repr(request.version))


def _disagreement(request: InferRequest, other: str) -> ProtocolError:
    return ProtocolError(
        f"run model {request.model!r}",
        expected="one adapter",
        got=f"parameter or header {ADAPTER_INPUT!r} {request.adapter!r} and {other}",
        fix="Name it once.",
    )

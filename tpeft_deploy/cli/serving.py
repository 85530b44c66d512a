"""Forms in which an adapter can be served, with their bytes: the second half of `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.errors import AdapterError, ExportError, MissingExtra, TpeftError, UnsupportedBase

if TYPE_CHECKING:
    from tpeft_deploy.adapter import Adapter
    from tpeft_deploy.bundle.directory import Bundle
    from tpeft_deploy.formats.read.module import BaseView

__all__ = ["COLUMNS", "file_bytes", "forms", "heads", "oracle", "refused"]

COLUMNS = ["form", "possible", "rows", "bytes", "reason"]
_BASE_ALONE = "by names and shapes alone; --base checks them"
_ROWS_LATER = "rows of different tasks in a batch: detected by running the graphs at export"


def forms(adapter: Adapter, base: str | None, opened: object) -> list[dict[str, Any]]:
    """For each of the three forms: whether it is possible, its rows, its bytes, and the reason.

    Args:
        adapter: adapter, read with the base if there is one.
        base: base as given on the command line.
        opened: open bundle, if the base is one.
    """
    if base is None:
        size, dense = adapter.nbytes, sum(all(f is None for f in delta.factors) for delta in adapter.deltas.values())
        whole = f"; {dense} changes are dense, as large as their weights" if dense else ""
        return _three(adapter, None, size, rows=None, reason=f"{_BASE_ALONE}{whole}")
    if not isinstance(opened, str):
        return _of_bundle(adapter, opened)  # type: ignore[arg-type]
    return _planned(adapter, base)


def refused(error: TpeftError) -> dict[str, Any]:
    """Row for all forms of an adapter that is refused."""
    reason = f"{error.doing}: {error.said}"
    return {"form": "any", "possible": False, "rows": None, "bytes": None, "reason": reason, "fix": error.fix}


def heads(adapter: Adapter, base: BaseView | None) -> dict[str, list[int]]:
    """Overrides with a first size that differs from the base's: name -> sizes of the base and of the adapter."""
    return {
        name: [base.shape(name)[0], array.shape[0]]
        for name, array in adapter.overrides.items()
        if base is not None and name in base.weights and array.shape[:1] != base.shape(name)[:1] and array.ndim
    }


def oracle(adapter: Adapter, opened: object) -> dict[str, Any] | None:
    """Comparison of the adapter at export, if the bundle has it as a task: `task`, `oracle`, `reason`, `error`."""
    import hashlib

    tasks = getattr(opened, "tasks", None) or {}
    digest = hashlib.sha256(adapter.to_bytes()).hexdigest() if tasks else ""
    task = next((task for task, current in tasks.items() if current == digest), None)
    return None if task is None else {"task": task, **opened.oracle(task)}  # type: ignore[attr-defined]


def file_bytes(path: Path) -> int:
    """Bytes of an adapter's file, or of the files in its directory."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())


def _three(
    adapter: Adapter, folded: int | None, size: int | None, *, rows: str | None, reason: str
) -> list[dict[str, Any]]:
    from tpeft_deploy.adapter import gain_mode

    several = [name for name, gain in adapter.gains.items() if gain_mode(gain) is None]
    many = f"; gain of {several[0]} has several axes: one task per run" if several else ""
    return [
        _form("folded", True, None, folded, "the base's weights, changed" if folded else _BASE_ALONE),
        _form("factored", True, None, size, reason),
        _form("banked", True, "group" if several else rows, size, f"{reason}{many}"),
    ]


def _form(form: str, possible: bool | None, rows: str | None, size: int | None, reason: str) -> dict[str, Any]:
    return {"form": form, "possible": possible, "rows": rows, "bytes": size, "reason": reason, "fix": None}


def _of_bundle(adapter: Adapter, bundle: Bundle) -> list[dict[str, Any]]:
    manifests = [part.manifest for part in bundle.components.values()]
    weight_bytes = sum(manifest.weight_bytes for manifest in manifests)
    grouped = next((manifest for manifest in manifests if manifest.rows == "group"), manifests[0])
    try:
        filled = bundle.fill(adapter)
    except AdapterError as error:
        row = refused(error)
        return [_three(adapter, weight_bytes, None, rows=None, reason="")[0]] + [
            {**row, "form": form} for form in ("factored", "banked")
        ]
    size = sum(array.nbytes for tensors in filled.values() for array in tensors.values())
    reason = f"it fits the branches of bundle {bundle.manifest.name}"
    rows = f"{reason}; one task per run: {grouped.rows_reason}" if grouped.rows_reason else reason
    found = _three(adapter, weight_bytes, size, rows=grouped.rows, reason=reason)
    return [*found[:2], {**found[2], "reason": rows}]


def _planned(adapter: Adapter, base: str) -> list[dict[str, Any]]:
    try:
        from tpeft_deploy.exporters.components import dry_run

        with stages() as begin:
            plan = dry_run(base, {"adapter": adapter}, name="inspect", progress=begin)
    except (UnsupportedBase, MissingExtra, ImportError) as error:
        reason = f"the base as given cannot be exported: {error}"
        return [_form(form, None, None, None, reason) for form in ("folded", "factored", "banked")]
    except (AdapterError, ExportError) as error:
        return [{**refused(error), "form": form} for form in ("folded", "factored", "banked")]
    size = plan["tasks"][0]["slot_bytes"]
    found = _three(adapter, plan["base_bytes"], size, rows=plan["rows"], reason="every target is in the traced graph")
    return [*found[:2], {**found[2], "reason": plan["rows_reason"] or _ROWS_LATER}]

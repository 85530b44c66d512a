"""Changes of weights that no output depends on, such as the last layer of a vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from tpeft_deploy.adapter import Adapter, without
from tpeft_deploy.bundle.split import UNREAD, warn_unread
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.ties import changed_names

__all__ = ["Unused", "drop_unused", "leave_out"]

Unused = Literal["error", "skip"]


def drop_unused(base: Base, adapters: Mapping[str, Adapter], resolved: Mapping[str, str]) -> dict[str, Adapter]:
    """The adapters without the changes that cannot be seen, which a warning names.

    Args:
        base: its raw graph tells what is used, and does so only where a torch module was traced.
        adapters: task -> adapter.
        resolved: weight name -> the initializer that holds it; what the graph does not use is absent.
    """
    if base.module is None:  # a name that is not found may be that of a weight that is fused into another
        return dict(adapters)
    used = set(resolved)
    for group in base.ties:
        used |= set(group) if used & set(group) else set()
    kept = {}
    for task, adapter in adapters.items():
        names = [name for name in changed_names(adapter) if name not in used]
        kept[task] = leave_out(adapter, names, task=task, base=base.name)
    return kept


def leave_out(adapter: Adapter, names: Sequence[str], *, task: str, base: str) -> Adapter:
    """Leave out an adapter's changes of weights that no output depends on, with a warning.

    Args:
        adapter: adapter to reduce.
        names: names of the weights; with none, the adapter is returned as it is.
        task: name of the adapter's task, for the warning.
        base: name of the base, for the warning.
    """
    if not names:
        return adapter
    warn_unread(task, names, base=base)
    return replace(without(adapter, names), left_out={**adapter.left_out, **dict.fromkeys(names, UNREAD)})

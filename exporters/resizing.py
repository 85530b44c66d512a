"""Vocabularies that were resized before training: tables and heads with more rows than the base has.

`model.resize_token_embeddings(n)` gives both the embedding and the head n rows, and an adapter that was trained then
replaces them whole.  The base follows it; the rows that it gains are zero, so that one base has one digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.manifest import Varies
from tpeft_deploy.errors import UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters.causes import said_by
from tpeft_deploy.exporters.oracle.base import Base

__all__ = ["check_vocabulary", "fit_vocabulary", "resize", "tables"]


def tables(module: nn.Module) -> list[nn.Module]:
    """The input embedding of a transformers model and its head over the vocabulary, as far as it has them."""
    found: list[Any] = []
    for side in ("input", "output"):
        try:
            found.append(getattr(module, f"get_{side}_embeddings", lambda: None)())
        except NotImplementedError:  # transformers' way to say that a model has none
            continue
    return [table for table in found if isinstance(getattr(table, "weight", None), torch.Tensor)]


def _rows_of(base: Base, adapter: Adapter) -> dict[str, int]:
    """Every table of the base's vocabulary that an adapter replaces -> the rows that it gives it."""
    return {name: len(adapter.overrides[name]) for name in sorted(base.vocabulary & adapter.overrides.keys())}


def check_vocabulary(base: Base, adapters: Mapping[str, Adapter], varies: Mapping[str, Varies]) -> None:
    """Refuse another vocabulary than the base's, unless an output is known to have as many columns as a task's.

    Raises:
        UnsupportedTarget: an adapter was trained after `resize_token_embeddings`.
    """
    for task, adapter in adapters.items() if not varies else ():
        for name, count in _rows_of(base, adapter).items():
            own = len(base.weights[name])
            if count != own:
                raise UnsupportedTarget(
                    f"export adapter {task!r} for {base.name}, override {name!r}",
                    expected=f"the {own} tokens of the base",
                    got=f"{count}, as after resize_token_embeddings({count})",
                    fix="Export with resize_embeddings=True (--resize-embeddings), which resizes the base as well.",
                )


def fit_vocabulary(base: Base, adapters: Mapping[str, Adapter]) -> Base:
    """The base with the vocabulary that its adapters were trained with; as it is, where they replace no table.

    Raises:
        UnsupportedTarget: the adapters have vocabularies of several sizes.
        UnsupportedBase: the base cannot be resized.
    """
    wanted: dict[int, str] = {}
    for task, adapter in adapters.items():
        wanted |= {rows: f"{rows} of {name!r} in task {task!r}" for name, rows in _rows_of(base, adapter).items()}
    if len(wanted) > 1:
        raise UnsupportedTarget(
            f"resize the embeddings of base {base.name}",
            expected="one number of rows for all adapters",
            got=" and ".join(wanted[rows] for rows in sorted(wanted)),
            fix="Export one bundle for every size of the vocabulary.",
        )
    return base.resized(next(iter(wanted))) if wanted else base


def resize(module: nn.Module, rows: int, name: str) -> nn.Module:
    """A copy of a transformers model with another number of rows in its vocabulary; all other weights are shared.

    Raises:
        UnsupportedBase: the model has no `resize_token_embeddings`, or it fails.
    """
    doing = f"resize the embeddings of base {name} to {rows} rows"
    if not hasattr(module, "resize_token_embeddings"):
        raise UnsupportedBase(
            doing,
            expected="a model of transformers, which has resize_token_embeddings",
            got=type(module).__name__,
            fix="Resize it in the factory that makes it.",
        )
    changed = {id(tensor) for table in tables(module) for tensor in table.parameters()}
    shared = [*module.parameters(), *module.buffers()]
    copied: Any = deepcopy(module, {id(tensor): tensor for tensor in shared if id(tensor) not in changed})
    before = [len(table.weight) for table in tables(copied)]  # type: ignore[arg-type]
    try:
        copied.resize_token_embeddings(rows, mean_resizing=False)
    except Exception as error:  # models raise every kind of exception; the cause is kept
        raise UnsupportedBase(doing, problem=said_by(error)) from error
    with torch.no_grad():
        for table, old in zip(tables(copied), before, strict=True):
            for tensor in table.parameters():
                tensor[old:] = 0
    resized: nn.Module = copied
    return resized

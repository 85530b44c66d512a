"""Cutting an adapter of a whole model to the part of it that is exported: a text encoder, a vision tower, a UNet.

A part is named by what stands before its names in the adapter: "model.language_model" for a LLaVA's decoder,
"model.encoder" for a Whisper's, "lora_unet" or "lora_te1" in kohya's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.read.names import PEFT_PREFIX, UNDERSCORED, inner, rest_of
from tpeft_deploy.formats.read.saved import Saved

__all__ = ["cut_adapter", "cut_saved", "prefixes"]

_MOST = 12  # prefixes in a message
_T = TypeVar("_T")


def cut_saved(saved: Saved, part: str, *, shared: Callable[[str], bool]) -> tuple[Saved, dict[str, str]]:
    """The tensors of one part, by the names they have, and what was left out.

    Args:
        saved: tensors and configuration of the whole model.
        part: the prefix.
        shared: whether a key is that of a tensor which modules of several parts use.

    Returns:
        The part, and tensor name -> why it is not in it.

    Raises:
        FormatError: no tensor is of the part.
    """
    modules = {key: None if shared(key) else rest_of(key, part) for key in saved.tensors}
    kept = {key: tensor for key, tensor in saved.tensors.items() if shared(key) or modules[key] is not None}
    if not any(rest is not None for rest in modules.values()):
        raise _no_part(saved.source, part, [key for key in saved.tensors if not shared(key)])
    left = [key for key in saved.tensors if key not in kept]
    return replace(saved, tensors=kept), dict.fromkeys(sorted(left), _why(part))


def cut_adapter(adapter: Adapter, part: str, base: BaseView | None) -> Adapter:
    """An adapter that is read already, cut to a part.

    Raises:
        FormatError: it changes nothing of the part.
    """
    names: dict[str, str] = {}
    changed = dict.fromkeys([*adapter.deltas, *adapter.gains, *adapter.overrides])
    for name in changed:
        rest = rest_of(name, part)
        if rest is not None:
            # Where the part's class keeps the prefix, the whole name is the part's too.
            names[name] = name if base is not None and rest not in base.weights and name in base.weights else rest
    if not names:
        raise _no_part(adapter.source, part, changed)

    def own(tensors: Mapping[str, _T]) -> dict[str, _T]:
        return {names[name]: tensor for name, tensor in tensors.items() if name in names}

    return replace(
        adapter,
        deltas=own(adapter.deltas),
        overrides=own(adapter.overrides),
        base_digests=own(adapter.base_digests),
        gains=own(adapter.gains),
        notes={names.get(name, name): note for name, note in adapter.notes.items() if name in names or name == "*"},
        left_out={name: _why(part) for name in changed if name not in names},
    )


def prefixes(keys: Iterable[str]) -> list[str]:
    """The parts that tensor names fall into: prefixes of kohya's files, or the first names that are not all alike."""
    known = {prefix for key in keys for prefix in UNDERSCORED if key.startswith(prefix)}
    if known:
        return sorted(prefix.rstrip("_") for prefix in known)
    paths = [inner(key).removeprefix(PEFT_PREFIX).split(".") for key in keys]
    first, last = min(paths, default=[]), max(paths, default=[])  # what both begin with, all begin with
    alike = next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
    depth = min([alike, *(len(path) - 1 for path in paths)])
    return sorted({".".join(path[: depth + 1]) for path in paths})


def _why(part: str) -> str:
    return f"not of part {part!r}"


def _no_part(source: str, part: str, keys: Iterable[str]) -> FormatError:
    found = prefixes(list(keys))
    return FormatError(
        f"read {source}, part {part!r}",
        expected=f"a part of it: {_listed(found)}",
        got="a prefix that none of its names has",
        fix="Give what stands before the part's names in the adapter.",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")

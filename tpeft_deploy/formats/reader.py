"""A reader of modules: the function that reads one format, with what the file's walk needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tpeft_deploy.formats.read.module import Change, Module

__all__ = ["About", "FormatReader", "reader", "without_config"]


class About(NamedTuple):
    """Description of a format for users: `tpeft-deploy formats` and docs/formats.md.

    Args:
        library: library or tool that writes it.
        method: common name of the training method.
        layers: layer kinds that it changes.
        base: "no", "yes", or the case in which the base is needed to read it.
        stored: form of the change: low-rank, dense, gain or override.
        notes: conditions, such as options that files must be saved with.
        types: values of PEFT's `peft_type` that it covers.
    """

    library: str
    method: str
    layers: str
    base: str
    stored: str
    notes: str = ""
    types: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class FormatReader:
    """Reader of one format.

    Args:
        name: name of the format, as `load_adapter(format=...)` takes it.
        about: description for users.
        suffixes: exact suffixes of the tensors that it consumes.
        marks: suffixes of which a module has at least one.
        matches: whether a module with a mark is of this format.
        read: computes the module's Change and pops every tensor that it consumes.  Raises FormatError if a tensor is
            missing or does not fit, if the configuration lacks a setting, and if no base was given that is needed.
        joined_suffixes: suffixes that follow the module's name without a dot.
        may_be_empty: suffixes of tensors that may be without values.
        shared: whole keys of tensors that several modules use, given as `module.checkpoint.shared`.
        shared_prefixes: prefixes of such keys; the reader adds those that it takes to `used` there.
    """

    name: str
    about: About
    suffixes: frozenset[str]
    marks: frozenset[str]
    matches: Callable[[Module], bool]
    read: Callable[[Module], Change]
    joined_suffixes: frozenset[str]
    may_be_empty: frozenset[str]
    shared: frozenset[str]
    shared_prefixes: tuple[str, ...]


def reader(
    name: str,
    about: About,
    suffixes: Iterable[str],
    *,
    marks: Iterable[str] | None = None,
    matches: Callable[[Module], bool] | None = None,
    joined_suffixes: Iterable[str] = (),
    may_be_empty: Iterable[str] = (),
    shared: Iterable[str] = (),
    shared_prefixes: tuple[str, ...] = (),
) -> Callable[[Callable[[Module], Change]], FormatReader]:
    """Make the decorated function the `read` of a FormatReader with these fields.

    `marks` defaults to all suffixes; `matches` to a PEFT file of one of the types in `about`, or any file if it has no
    types.
    """
    consumed = frozenset(suffixes)

    def of_type(module: Module) -> bool:
        return not about.types or module.checkpoint.config.get("peft_type") in about.types

    def decorate(read: Callable[[Module], Change]) -> FormatReader:
        return FormatReader(
            name,
            about,
            consumed,
            consumed if marks is None else frozenset(marks),
            matches or of_type,
            read,
            frozenset(joined_suffixes),
            frozenset(may_be_empty),
            frozenset(shared),
            shared_prefixes,
        )

    return decorate


def without_config(module: Module) -> bool:
    """Whether the file came without adapter_config.json: `matches` of formats with PEFT's suffixes in a single file."""
    return not module.checkpoint.config

"""Weights that a bundle's adapters may not change, such as those that make all rows of a run take one adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.errors import UnknownTarget, UnsupportedTarget

__all__ = ["covers", "without"]


def without(
    targets: Sequence[Target], exclude: Iterable[str], names: Iterable[str], *, base: str, given: bool
) -> list[Target]:
    """The targets that are left.

    Args:
        targets: weights that adapters may change.
        exclude: names of weights or of modules, `*` and `?` included; a module stands for all weights inside it.
        names: every weight of the base.
        base: the base's name.
        given: whether the targets are what given adapters change, rather than all that adapters could.

    Raises:
        UnknownTarget: a name is that of no weight.
        UnsupportedTarget: a given adapter changes an excluded weight: without a branch it would be served wrong.
    """
    patterns, names = list(dict.fromkeys(exclude)), list(names)
    for pattern in patterns:
        if not any(covers(pattern, name) for name in names):
            raise UnknownTarget(
                f"exclude {pattern!r} from the targets of {base}",
                expected="a weight or a module of the base",
                got="a name that no weight has",
            )
    gone = [target.name for target in targets if any(covers(pattern, target.name) for pattern in patterns)]
    if gone and given:
        raise UnsupportedTarget(
            f"exclude {', '.join(dict.fromkeys(gone))} from the targets of {base}",
            expected="weights that no given adapter changes",
            got="changes of them, which would be lost",
            fix="Train the adapters without these modules, leave out --exclude, or use export folded.",
        )
    return [target for target in targets if target.name not in gone]


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern is that of a weight, or of a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

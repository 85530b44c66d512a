"""Names of the classes of a task's head, and how its logits become probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["HeadLabels", "HeadProblem"]

HeadProblem = Literal["single_label_classification", "multi_label_classification", "regression"]
_MOST = 1 << 16  # classes, and bytes of a name


@dataclass(frozen=True)
class HeadLabels:
    """Classes of a head.

    Args:
        names: names of the classes in the order of the logits; empty where none are recorded.
        problem: softmax, sigmoid or neither; None for what transformers assumes: regression for a head of one output,
            one class of several otherwise.
    """

    names: tuple[str, ...] = ()
    problem: HeadProblem | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> HeadLabels | None:
        """Read `id2label` and `problem_type` of a config.json; None where neither is there, or they are malformed."""
        given, problem = config.get("id2label"), config.get("problem_type")
        names: tuple[Any, ...] = ()
        if isinstance(given, Mapping) and 0 < len(given) <= _MOST:
            numbered = {str(index): name for index, name in given.items()}
            names = tuple(numbered.get(str(index)) for index in range(len(numbered)))
        return cls.checked(names, problem)

    @classmethod
    def checked(cls, names: Any, problem: Any) -> HeadLabels | None:
        """Make labels of values of any type; None where nothing is known, or the names are none."""
        if not isinstance(names, list | tuple) or len(names) > _MOST or not all(map(_is_name, names)):
            names = ()
        problem = problem if problem in get_args(HeadProblem) else None
        return cls(tuple(names), problem) if names or problem else None


def _is_name(name: object) -> bool:
    if not isinstance(name, str):
        return False
    try:
        return len(name.encode()) <= _MOST
    except UnicodeEncodeError:  # half of a surrogate pair
        return False

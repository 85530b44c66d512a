"""What a conformance check knows about the server that it checks, and how it compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpeft_deploy.tucker import Array

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Facts:
    """The models that a key sees, with one example.

    Attributes:
        bundle: name that takes an `adapter` input beside the model's own.
        inputs: an example, rows first in all of them.
        versions: task -> version -> whole outputs for the example; `base` among them; the last version is the one
            that a request without a version gets.
        foreign: name of a task that exists but belongs to another tenant.
        own: a task of the key's tenant, which the checks unload and load again.
        rtol, atol: of floating outputs.
        platform: in the metadata.
        extensions: that the server says it has, at least.
    """

    bundle: str
    inputs: Mapping[str, Array]
    versions: Mapping[str, Mapping[str, Outputs]]
    foreign: str
    own: str
    rtol: float = 1e-5
    atol: float = 1e-6
    platform: str = "onnx_onnxv1"
    extensions: Sequence[str] = field(default=("statistics", "model_repository"))

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    def newest(self, task: str) -> tuple[str, Outputs]:
        return list(self.versions[task].items())[-1]

    def mixed(self) -> tuple[list[str], Outputs]:
        """A task for each row, and the rows that each gives."""
        names = list(self.versions)
        tasks = [names[row % len(names)] for row in range(self.rows)]
        each = [self.newest(task)[1] for task in tasks]
        return tasks, {name: np.stack([one[name][row] for row, one in enumerate(each)]) for name in each[0]}

    def compare(self, got: Mapping[str, Array | None], expected: Outputs) -> None:
        """Whole outputs, their names, order, shapes and dtypes."""
        assert list(got) == list(expected)
        for name, wanted in expected.items():
            found = got[name]
            assert found is not None, name
            assert found.dtype == wanted.dtype, name
            assert found.shape == wanted.shape, name
            np.testing.assert_allclose(found, wanted, rtol=self.rtol, atol=self.atol, err_msg=name)


def first_rows(arrays: Outputs, count: int) -> dict[str, Array]:
    return {name: array[:count] for name, array in arrays.items()}

"""A base with other names for inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy

import onnx_ir as ir
from torch import nn

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.oracle.base import Base, Inputs, Outputs
from tpeft_deploy.ties import Ties
from tpeft_deploy.tucker import Array

__all__ = ["Renamed"]


class Renamed(Base):
    """Another base under other names.

    Args:
        base: the base itself.
        names: name of an input or output in the base -> new name.

    Raises:
        UnsupportedBase: by `graph`, when a name is not one of its inputs or outputs, or a new one is taken.
    """

    def __init__(self, base: Base, names: Mapping[str, str]) -> None:
        super().__init__(base.name, {names.get(name, name): array for name, array in base.inputs.items()})
        self.padding = {names.get(name, name): value for name, value in base.padding.items()}
        self.module = base.module
        self.own_names = {**base.own_names, **{new: base.own_names.get(old, old) for old, new in names.items()}}
        self._base = base
        self._names = dict(names)

    @property
    def weights(self) -> Mapping[str, Array]:
        """The base's own: weights keep their names."""
        return self._base.weights

    @property
    def aliases(self) -> Mapping[str, str]:
        """The base's own."""
        return self._base.aliases

    @property
    def ties(self) -> Ties:
        """The base's own."""
        return self._base.ties

    @property
    def view(self) -> object:
        """The base's own."""
        return self._base.view

    @property
    def vocabulary(self) -> frozenset[str]:
        """The base's own."""
        return self._base.vocabulary

    def resized(self, rows: int) -> Base:
        """The base resized, under the new names."""
        return Renamed(self._base.resized(rows), self._names)

    def with_module(self, module: nn.Module) -> Base:
        """The base with another module, under the new names."""
        other = copy(self)
        other._base, other.module = self._base.with_module(module), module
        return other

    @property
    def batched(self) -> bool:
        """Whether the base is batched."""
        return self._base.batched

    def graph(self) -> ir.Model:
        """The base's graph with its inputs and outputs renamed."""
        model = self._base.graph()
        ports = {str(value.name): value for value in [*model.graph.inputs, *model.graph.outputs]}
        taken = {str(value.name) for node in model.graph for value in node.outputs} | set(model.graph.initializers)
        taken |= set(ports)
        for old, new in self._names.items():
            if old not in ports or new in taken - set(self._names):
                raise UnsupportedBase(
                    f"rename {old!r} of base {self.name} to {new!r}",
                    expected=f"one of {', '.join(ports)}"
                    if old not in ports
                    else "a name that the graph does not have",
                    got=repr(old if old not in ports else new),
                )
            ports[old].name = new
        return model

    def reference(self, adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
        """Run the base, under the new names."""
        old = {new: name for name, new in self._names.items()}
        own = {old.get(name, name): array for name, array in inputs.items()}
        outputs = self._base.reference(adapter, own, [old.get(name, name) for name in names])
        return {self._names.get(name, name): array for name, array in outputs.items()}

    def knowing(self, adapters: Iterable[Adapter]) -> Base:
        """The base with what the adapters recorded, under the new names."""
        return Renamed(self._base.knowing(adapters), self._names)

    def proves(self, name: str) -> bool:
        """As the base does."""
        return self._base.proves(name)

    def check(self, adapter: Adapter) -> None:
        """As the base does."""
        self._base.check(adapter)

"""Base models as the exporters see them: a raw graph, its weights, and an oracle that knows nothing of branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.ties import Ties, settle
from tpeft_deploy.tucker import Array

__all__ = ["Base", "Inputs", "Outputs"]

Inputs = Mapping[str, Array]
Outputs = dict[str, Array]


class Base(ABC):
    """A base model.

    Args:
        name: for messages and as the default name of a bundle.
        inputs: example inputs by name, as the exported graph takes them.
    """

    module: nn.Module | None = None  # the torch module, where there is one
    decoder: DecoderPorts | None = None  # ports of a decoder in slot form
    directory: Path | None = None  # Hugging Face directory of the model
    floating: Base | None = None  # the base before its weights were quantised
    own_names: Mapping[str, str] = {}  # input or output -> the name it has in the module, where that is another

    def __init__(self, name: str, inputs: Inputs) -> None:
        self.name = name
        self.inputs = inputs
        self.padding: Mapping[str, int | float] = {}  # input -> what it may be filled up with, if the proof agrees

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, Array]:
        """Every parameter and buffer by every name it has, tied ones included."""

    @property
    @abstractmethod
    def aliases(self) -> Mapping[str, str]:
        """Every name of a parameter or buffer -> the first name of the same parameter of the same module."""

    @property
    def ties(self) -> Ties:
        """Tensors that several modules hold: for each, a name in every module, as `aliases` gives it."""
        return ()

    @property
    @abstractmethod
    def view(self) -> object:
        """Object that `load_adapter(base=...)` takes to resolve names."""

    @property
    def vocabulary(self) -> frozenset[str]:
        """Names of the weights that have a row for every token; none where that is not known."""
        return frozenset()

    def resized(self, rows: int) -> Base:
        """This base with another number of rows in the tables of its vocabulary.

        Raises:
            UnsupportedBase: it cannot be resized.
        """
        raise UnsupportedBase(
            f"resize the embeddings of base {self.name} to {rows} rows",
            expected="a model of transformers",
            got="an ONNX graph",
            fix="Export the model anew after model.resize_token_embeddings.",
        )

    @property
    @abstractmethod
    def batched(self) -> bool:
        """Whether some input's first axis is dynamic: the batch."""

    @abstractmethod
    def graph(self) -> ir.Model:
        """The model as a raw graph: every weight under its name with its value, nothing optimised.

        Raises:
            UnsupportedBase: it cannot be exported.
        """

    @abstractmethod
    def reference(self, adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
        """Run the model with the adapter's merged weights, without any branch: output -> array.

        Args:
            adapter: or None for the base itself.
            inputs: arrays by input name.
            names: output names, in the graph's order.
        """

    def in_both(self, inputs: Inputs, names: Sequence[str]) -> tuple[Outputs, Outputs]:
        """Run a model in 16 bits as it is, and in 32 bits with the same weights.

        Args:
            inputs: arrays by input name.
            names: output names, in the graph's order.

        Raises:
            UnsupportedBase: the model does not run in 16 bits here.
        """
        del inputs, names
        raise UnsupportedBase(f"run {self.name} in 16 bits", problem="only the model itself tells what that is")

    def at(self, inputs: Inputs) -> Base:
        """This base with other example inputs."""
        other = copy(self)
        other.inputs = inputs
        return other

    def with_module(self, module: nn.Module) -> Base:
        """This base with another torch module of the same architecture.

        Raises:
            TypeError: it has none.
        """
        raise TypeError(f"base {self.name} has no torch module in place of which {type(module).__name__} could stand")

    def knowing(self, adapters: Iterable[Adapter]) -> Base:
        """This base, its names resolved with what the adapters recorded about it."""
        del adapters
        return self

    def proves(self, name: str) -> bool:
        """Whether it is certain which initializer of the graph holds a weight: of a raw export it is for all."""
        del name
        return True

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter with names, shapes or recorded base digests that do not fit.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: it does not fit.
        """
        weights = self.weights
        adapter = settle(adapter, self.aliases, self.ties, doing=f"fit {adapter.source} to base {self.name}")
        adapter.check_shapes({name: weight.shape for name, weight in weights.items()}, base=f"base {self.name}")
        digests = {name: weight_digest(weights[name]) for name in adapter.base_digests if name in weights}
        adapter.check_digests(digests, base=f"base {self.name}")

    def merged(self, adapter: Adapter, name: str) -> Array:
        """Merge a weight: gain * (W + dW), in float64 and rounded once, or the override."""
        weight = self.weights[name]
        if name in adapter.overrides:
            return np.array(adapter.overrides[name], dtype=weight.dtype)
        return adapter.merged(name, weight).astype(weight.dtype)

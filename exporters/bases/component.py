"""One component of a model: a module that is exported as a graph, with the names of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.text_files import Mode, Pooling
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.formats.read.base_view import view
from tpeft_deploy.formats.read.module import BaseView

__all__ = ["Component"]


@dataclass(frozen=True, eq=False)
class Component:
    """One component of a model, for `export_bundle`.

    Args:
        module: a part of the model, with its place in `prefix`; or the whole model, with a `forward` that runs the
            part.  With the whole model an export is compared with the training library's forward too.
        example_inputs: tensors by input name, as `export_bundle` takes them.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        prefix: path of the module in the whole model, "vision_tower"; adapters have names that begin with it.
        forward: function of the module and the inputs, by name, that computes the component's outputs; by default the
            module's forward, which the function may call as `module.forward_of_whole`.
        padding: padding values by input, as `export_bundle` takes them.
        rename: other names for inputs and outputs, as `export_bundle` takes them.
        decoder: ports of a decoder in slot form.
        directory: Hugging Face directory of the model, for its text.
        pooling: how embeddings of texts are made of `last_hidden_state`, as `export_bundle` takes it; for the component
            that embeds text, which has a directory.
    """

    module: nn.Module
    example_inputs: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Any] | None = None
    prefix: str = ""
    forward: Callable[..., object] | None = None
    padding: Mapping[str, int | float] | None = None
    rename: Mapping[str, str] | None = None
    decoder: DecoderPorts | None = None
    directory: Path | None = None
    pooling: Pooling | Mode | None = None

    @property
    def base_view(self) -> BaseView:
        """Names of the whole model and values of the part, for `load_adapter(base=...)`."""
        return view(self.base("model").view)

    def base(self, name: str) -> Base:
        """Load the component as a base.

        Args:
            name: name of the component.

        Raises:
            UnsupportedBase: it is not a plain torch module with example inputs.
        """
        module: object = self.module
        if isinstance(module, nn.Module) and not hasattr(module, "peft_config"):
            module = _with_forward(module, self.forward) if self.forward is not None else module
            module = _placed(module, self.prefix.rstrip("."), name) if self.prefix else module
        if not isinstance(module, nn.Module):
            raise UnsupportedBase(f"load component {name!r}", expected="a torch module", got=type(module).__name__)
        base = load_base(
            module, example_inputs=self.example_inputs, dynamic_shapes=self.dynamic_shapes, rename=self.rename
        )
        base.name = f"component {name!r}"
        base.decoder, base.directory = self.decoder, None if self.directory is None else Path(self.directory)
        return base


def _with_forward(module: nn.Module, forward: Callable[..., object]) -> nn.Module:
    """Make a module with the same submodules and weights, under the same names, and another forward method."""

    @wraps(forward)
    def run(own: nn.Module, *args: object, **kwargs: object) -> object:
        return forward(own, *args, **kwargs)

    other = copy(module)
    other.__class__ = type(
        type(module).__name__, (type(module),), {"forward": run, "forward_of_whole": type(module).forward}
    )
    return other


def _placed(module: nn.Module, prefix: str, name: str) -> nn.Module:
    """Put a module at its path in an otherwise empty module, which has the forward method of the module."""
    *outer, last = prefix.split(".")
    if not all([*outer, last]):
        raise UnsupportedBase(
            f"load component {name!r}", expected="a prefix such as 'vision_tower.encoder'", got=repr(prefix)
        )

    class Placed(nn.Module):
        @wraps(type(module).forward)
        def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            return self.get_submodule(prefix)(*args, **kwargs)

    shell = holder = Placed()
    for step in outer:
        inner = nn.Module()
        holder.add_module(step, inner)
        holder = inner  # type: ignore[assignment]
    holder.add_module(last, module)
    return shell

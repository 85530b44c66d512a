"""Base class of adapted layers: parameters, forward, merging, and PEFT's interface."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from tpeft_deploy.training.config import Ranks, TuckerConfig, mode_ranks
from tpeft_deploy.training.contraction import break_even, contract, initial_core, initial_factor

__all__ = ["TuckerLayer"]

# Attributes that belong to one object: special methods for copying and pickling, and accelerate's hooks.
_NOT_DELEGATED = ("__", "_hf_hook", "_old_forward")


class TuckerLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen layer with the tensor adapters of its weight.

    Per adapter it holds `tucker_core` (R_o, R_i, R_k1, ...) and `tucker_factor`, a (mode size, rank) matrix for every
    mode with a rank below its size.  Modes are those of the stored weight: (O, I per group, K1, ...), for an embedding
    (num, dim), for a transposed convolution (I, O per group, K1, ...), for transformers' Conv1D (I, O).  Attributes
    that the layer lacks are read from the base layer.  A subclass per layer type defines the forward through the
    factors and through dW.

    Args:
        base_layer: layer to adapt, of a type in `adapts`.
        adapter_name: name of the first adapter.
        config: configuration of that adapter.
        ranks: `config.ranks`, or the ranks from `config.rank_pattern` for this layer.

    Raises:
        ValueError: the layer cannot be adapted, or the adapter does not fit the layer.
    """

    adapts: ClassVar[tuple[type[nn.Module], ...]]
    adapter_layer_names: tuple[str, ...] = ("tucker_core", "tucker_factor")
    other_param_names: tuple[str, ...] = ("tucker_scale", "tucker_dropout", "tucker_break_even")

    # Inherited from PEFT; type checkers do not see them behind nn.Module.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: TuckerConfig, ranks: Ranks) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tucker_core = nn.ParameterDict()
        self.tucker_factor = nn.ModuleDict()
        self.tucker_dropout = nn.ModuleDict()
        self.tucker_scale: dict[str, float] = {}
        self.tucker_break_even: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[nn.Parameter, ...] = ()  # original parameter while adapters are merged
        self._active_adapter = adapter_name
        self._check_base()
        self.update_layer(adapter_name, config, ranks)

    def __getattr__(self, name: str) -> Any:
        """Look up attributes that this layer lacks in the base layer: models read strides and sizes.

        Methods of the base layer run with the adapted weight.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith(_NOT_DELEGATED):
                raise
        value = getattr(base, name)
        bound = inspect.ismethod(value) and value.__self__ is base
        return partial(self._call_base, name) if bound else value

    def _call_base(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return functional_call(_Method(self.base_layer, method), {"layer.weight": self.weight}, args, kwargs)

    # Implemented by subclasses.

    def _is_stock(self) -> bool:
        """Whether the base layer has the forward of torch's class, so that a branch may be added to its output."""
        raise NotImplementedError

    def _multiplications(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Multiplications per output position through the factors, and through dW."""
        raise NotImplementedError

    def _positions(self, x: Tensor) -> float:
        """Number of output positions for an input."""
        raise NotImplementedError

    def _through_factors(self, x: Tensor, core: Tensor, factors: dict[int, Tensor]) -> Tensor:
        raise NotImplementedError

    def _through_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    # Adapters.

    def update_layer(self, adapter_name: str, config: TuckerConfig, ranks: Ranks) -> None:
        """Add an adapter, or reset one to its initial values."""
        if config.dropout and not self._is_stock():
            raise ValueError(
                f"{type(self.base_layer).__name__} overrides forward, so its branch has no input to drop; set dropout=0"
            )
        shape = tuple(self.base_weight.shape)
        core_shape = mode_ranks(ranks, shape)
        self.tucker_core[adapter_name] = nn.Parameter(initial_core(core_shape, zero=config.init_weights))
        self.tucker_factor[adapter_name] = nn.ParameterDict(
            {
                str(mode): nn.Parameter(initial_factor(size, rank))
                for mode, (size, rank) in enumerate(zip(shape, core_shape, strict=True))
                if rank < size
            }
        )
        self.tucker_scale[adapter_name] = config.scale
        self.tucker_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.tucker_break_even[adapter_name] = break_even(*self._multiplications(core_shape), core_shape, shape)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def share(self, adapter_name: str, other: TuckerLayer) -> None:
        """Share the parameters of an adapter with another layer that uses the same tied weight."""
        self.tucker_core[adapter_name] = other.tucker_core[adapter_name]
        self.tucker_factor[adapter_name] = other.tucker_factor[adapter_name]
        self.tucker_break_even[adapter_name] = other.tucker_break_even[adapter_name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute dW of one adapter, with the shape of the weight, in float32 or the wider dtype of its parameters."""
        core, factors = self._parts(adapter)
        wide = torch.promote_types(core.dtype, torch.float32)
        built = contract(core.to(wide), {mode: factor.to(wide) for mode, factor in factors.items()})
        return self.tucker_scale[adapter] * built

    def _parts(self, adapter: str) -> tuple[Tensor, dict[int, Tensor]]:
        factors = cast(nn.ParameterDict, self.tucker_factor[adapter])
        return self.tucker_core[adapter], {int(mode): factor for mode, factor in factors.items()}

    def _live(self) -> list[str]:
        """Active adapters of this layer that are not merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in dict.fromkeys(self.active_adapters) if name in self.tucker_core]

    # Weights.

    def _check_base(self) -> None:
        weight = dict(self.base_layer.named_parameters(recurse=False)).get("weight")
        if weight is None:
            raise ValueError("its weight is not a plain parameter (a parametrization, or pruning, computes it)")
        if not weight.is_floating_point():
            raise ValueError(f"its weight is {weight.dtype}; quantized layers cannot be adapted")

    @property
    def base_weight(self) -> Tensor:
        """Frozen weight of the base, without merged adapters."""
        return self._unmerged[0].detach() if self._unmerged else cast(Tensor, self.base_layer.weight)

    @property
    def weight(self) -> Tensor:
        """Adapted weight of the layer, with all active adapters.

        Some modules read a layer's weight instead of calling the layer (torch's MultiheadAttention for out_proj,
        TransformerEncoderLayer in eval mode): with the base's weight they would ignore the adapter.  Dropout of the
        branch has no effect there.
        """
        if self.disable_adapters:
            return self.base_weight
        weight = cast(Tensor, self.base_layer.weight)
        for name in self._live():
            weight = (weight + self.get_delta_weight(name)).to(weight.dtype)
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes of some adapters (the active ones by default) to the base weight.

        Raises:
            ValueError: with `safe_merge`, a merged weight would hold NaN or infinity; nothing is merged then.
        """
        chosen: list[str] = check_adapters_to_merge(self, adapter_names)
        names = [name for name in dict.fromkeys(chosen) if name in self.tucker_core]
        if not names:
            return
        parameter = cast(nn.Parameter, self.base_layer.weight)
        weight = parameter.data
        with torch.no_grad():
            for name in names:
                delta = self.get_delta_weight(name)
                weight = (weight + delta.to(weight.device)).to(weight.dtype)
                if safe_merge and not torch.isfinite(weight).all():
                    raise ValueError(f"merge adapter {name!r}: the merged weight holds NaN or infinity")
        # The parameter is kept, so that unmerging restores the base exactly and its digest holds; and replaced, not
        # overwritten, because other modules may use the same tied weight.
        self._unmerged = self._unmerged or (parameter,)
        self.base_layer.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight exactly."""
        if not self._unmerged:
            return
        (parameter,), self._unmerged = self._unmerged, ()
        parameter.data = parameter.data.to(cast(nn.Parameter, self.base_layer.weight))
        self.base_layer.weight = parameter
        self.merged_adapters.clear()

    # Running.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the branches of the active adapters, in the base layer's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        live = self._live()
        if live and not self._is_stock():
            whole: Tensor = functional_call(self.base_layer, {"weight": self.weight}, (x, *args), kwargs)
            return whole
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in live:
            result = result + self._branch(name, x, *args, **kwargs).to(result.dtype)
        return result

    def _branch(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        core, factors = self._parts(name)
        x = self.tucker_dropout[name](self._cast_input_dtype(x, core.dtype))
        return self._change(name, x, core, factors, *args, **kwargs)

    def _change(
        self, name: str, x: Tensor, core: Tensor, factors: dict[int, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        limit = self.tucker_break_even[name]
        # An infinite limit is checked first: the branch then does not depend on the input's size, and compiles once.
        if limit == math.inf or self._positions(x) < limit:
            return self.tucker_scale[name] * self._through_factors(x, core, factors, *args, **kwargs)
        delta = self.get_delta_weight(name).to(x.dtype if x.is_floating_point() else core.dtype)
        return self._through_delta(x, delta, *args, **kwargs)


class _Method(nn.Module):
    """A method of a layer as a module, which `functional_call` can run with another weight."""

    def __init__(self, layer: nn.Module, method: str) -> None:
        super().__init__()
        self.layer = layer
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.layer, self.method)(*args, **kwargs)

"""The tuner: injects tensor adapters into a model, and checks each adapter against the base it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import BaseMismatch, UnknownTarget
from tpeft_deploy.training.config import TuckerConfig
from tpeft_deploy.training.kinds import KINDS
from tpeft_deploy.training.layer import TuckerLayer

__all__ = ["TuckerModel"]


class TuckerModel(BaseTuner):  # type: ignore[misc]
    """A model with tensor adapters in its target modules; PEFT creates it for a `TuckerConfig`.

    Raises:
        ValueError: a target cannot be adapted, because of its type or because the ranks do not fit it.
        BaseMismatch, UnknownTarget: the configuration belongs to an adapter of another base.
    """

    prefix: str = "tucker_"
    tuner_layer_cls = TuckerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # For `ensure_weight_tying`: selects the modules of a tied weight that are adapted, and those that share them.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie
    _add_targets_to_tie = LoraModel._add_targets_to_tie

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the targets, and check or record the digests of their base weights."""
        # A copy: the digests of this base must not be carried to the next one in the user's object.
        config = cast(TuckerConfig, copy.deepcopy(self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        _check_digests(model, config, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not config.base_digests:
            config.base_digests = {
                f"{name}.weight": _digest(module.base_weight)
                for name, module in model.named_modules()
                if isinstance(module, TuckerLayer)
                and adapter_name in module.tucker_core
                and not module.base_weight.is_meta
            }

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if cast(TuckerConfig, peft_config).target_modules is None:
            raise ValueError("TuckerConfig target_modules: expected names of modules to adapt, got none")
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if adapter_name.isdigit():
            # PEFT drops state dict keys that contain another adapter's name; layers and modes are numbered in keys.
            raise ValueError(f"adapter name {adapter_name!r}: expected more than digits, which number layers and modes")
        config = cast(TuckerConfig, peft_config)
        ranks = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.ranks)
        try:
            if isinstance(target, TuckerLayer):
                target.update_layer(adapter_name, config, ranks)
                layer = target
            else:
                layer = _kind(target)(target, adapter_name, config, ranks)
                if adapter_name not in self.active_adapters:
                    layer.requires_grad_(False)
                self._replace_module(parent, target_name, layer, target)
            if self._check_tied_module_exists(config, current_key):
                layer.share(adapter_name, cast(Any, self.model).get_input_embeddings())
        except ValueError as error:
            raise ValueError(f"adapt module {current_key!r}: {error}") from error

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method copies weight and bias to the new module, which has neither.
        setattr(parent, child_name, new_module)
        # A module that is registered several times must be replaced under all its names.
        for module in list(self.model.modules()):
            for name, other in list(module._modules.items()):
                if other is child and module is not new_module:
                    setattr(module, name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        first_names: dict[nn.Module, str] = {}
        # Parameters are saved under the first name of a module; the other names would be reported missing.
        for name, module in model.named_modules(remove_duplicate=False):
            first = first_names.setdefault(module, name)
            if isinstance(module, TuckerLayer) and name != first:
                saved = [key for key in loaded if key.startswith(f"{first}.")]
                loaded |= {name + key.removeprefix(first): loaded[key] for key in saved}
        return loaded

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT removes adapter_names from the arguments: every row would silently use the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: mixed batches are not supported while training; run one adapter at a time with "
                "set_adapter, or serve a bundle with tpeft_deploy.Runtime and tasks="
            )
        yield


def _kind(target: nn.Module) -> type[TuckerLayer]:
    for kind in KINDS:
        if isinstance(target, kind.adapts):
            return kind
    supported = ", ".join(base.__name__ for kind in KINDS for base in kind.adapts)
    raise ValueError(f"expected one of {supported}, got {type(target).__module__}.{type(target).__name__}")


def _digest(weight: Tensor) -> str:
    return weight_digest(weight.detach().float().cpu().numpy())


def _check_digests(model: nn.Module, config: TuckerConfig, adapter_name: str) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    doing = f"load adapter {adapter_name!r} onto {type(model).__name__}, weight "
    for name, expected in config.base_digests.items():
        module = modules.get(name.removesuffix(".weight"))
        weight = getattr(module, "base_weight" if isinstance(module, TuckerLayer) else "weight", None)
        if not isinstance(weight, Tensor):
            raise UnknownTarget(
                f"{doing}{name!r}",
                expected="a weight of the base",
                got="no weight of that name",
                fix="Check that the base is what the adapter was trained on.",
            )
        if not weight.is_meta and (got := _digest(weight)) != expected:
            raise BaseMismatch(
                f"{doing}{name!r}",
                problem="the adapter was trained on another base",
                expected=f"base weight {expected[:12]}...",
                got=f"{got[:12]}...",
                fix="Use the base it was trained on, or train it again on this one.",
            )

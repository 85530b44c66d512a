"""PEFT methods and options that are not read: they are no change of weights, or the file lacks data; with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tpeft_deploy.errors import FormatError, brief

__all__ = ["READ_TYPES", "check_fields", "refusals", "refuse"]

_MERGE = "Merge it with PEFT's merge_and_unload and export the merged model as a separate base."
_OTHER = "Serve it with PEFT, or train the task again with a method that changes weights, such as LoRA."
_CONVERT = "Save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...)."


class _Refusal(NamedTuple):
    reason: str
    fix: str


def _each(names: str, reason: str, fix: str) -> dict[str, _Refusal]:
    return dict.fromkeys(names.split(), _Refusal(reason, fix))


_TYPES = (
    _each(
        "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADAPTION_PROMPT CPT CARTRIDGE",
        "it adds inputs or attention states, and changes no weight",
        _OTHER,
    )
    | _each("XLORA POLY LILY", "it routes between several changes by the input, so there is no one change", _OTHER)
    | _each("SHADOW", "it runs additional layers beside the base", _OTHER)
    | _each(
        "PSOFT",
        "it rotates singular vectors of the base weight, and does not save their signs",
        _MERGE,
    )
    | _each("ADAMSS", "it groups outputs by a clustering of the base weight that is not saved", _MERGE)
)

READ_TYPES = frozenset(
    {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "PVERA", "TINYLORA", "IA3", "DELORA", "MISS", "TPEFT_TUCKER"}
    | {"RANDLORA", "C3A", "FOURIERFT", "WAVEFT", "VBLORA", "UNILORA", "SHIRA", "SUPERTUNING", "GRALORA"}
    | {"LN_TUNING", "BEFT", "TRAINABLE_TOKENS"}
    | {"OFT", "BOFT", "HRA", "HIRA", "ROAD", "GLORA", "DEFT", "OSF", "PEANUT", "FROD"}
)
_UNKNOWN = _Refusal("this version does not support it", _MERGE)

_FIELDS = {
    "use_qalora": _Refusal("QALoRA pools the input before the adapter, which is no change of the weight", _OTHER),
    "use_bdlora": _Refusal("BD-LoRA's block-diagonal factors are not read by this version", _MERGE),
    "alora_invocation_tokens": _Refusal("aLoRA starts changing the weights in the middle of a sequence", _OTHER),
    "arrow_config": _Refusal("Arrow routes between several adapters by the input", _OTHER),
    "kasa_config": _Refusal("KaSA changes the base weight when the adapter is created", _MERGE),
    "monteclora_config": _Refusal("MonteCLoRA samples its change", _OTHER),
    "velora_config": _Refusal("VeLoRA's variant of the layer is not read by this version", _MERGE),
    "layer_replication": _Refusal("it repeats layers of the base, which makes another model", _MERGE),
    "megatron_config": _Refusal("its tensors belong to Megatron's layers", _MERGE),
    "sample_at_inference": _Refusal("PVeRA samples its change at each run", _OTHER),
}

# Inits that do not change the base, and the two that `residual` computes from the base.
_HARMLESS = frozenset({"gaussian", "orthogonal", "eva", "mica", "pissa", "olora"})
_INITS = {
    "pissa_niter": _Refusal(
        "PiSSA with a randomised decomposition changed the base weight by an unknown amount", _CONVERT
    ),
    "corda": _Refusal("CorDA changed the base weight by an amount that depends on its data", _CONVERT),
    "loftq": _Refusal("LoftQ replaced the base weight by a quantised one", _MERGE),
    "lora_ga": _Refusal("LoRA-GA changed the base weight by an amount that depends on its gradients", _CONVERT),
}
_NO_INDICES = _Refusal(
    "the indices depend on the order in which PEFT visited the layers",
    "Set save_indices to true in adapter_config.json, load the adapter with PEFT, and save it again.",
)


def refuse(config: Mapping[str, Any], source: str) -> None:
    """Raise if adapter_config.json has a method or option that is not read exactly.

    Args:
        config: content of adapter_config.json; empty for files without one.
        source: path of the adapter, for messages.

    Raises:
        FormatError: names the method or the field, with the reason and a fix.
    """
    check_fields(config, source)
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind not in READ_TYPES:
        raise _error(source, f"a PEFT adapter of peft_type {kind!r}", _TYPES.get(kind, _UNKNOWN))
    for field, refusal in _FIELDS.items():
        if config.get(field):
            raise _error(source, f"{field} in adapter_config.json", refusal)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _HARMLESS:
        refusal = next((r for name, r in _INITS.items() if init.lower().startswith(name)), _UNKNOWN)
        raise _error(source, f"init_lora_weights={init!r}", refusal)
    if kind == "UNILORA" and not config.get("save_indices"):
        raise _error(source, "save_indices=False", _NO_INDICES)


def check_fields(config: Mapping[str, Any], source: str) -> None:
    """Raise if a field of patterns or names that readers use has another type than in PEFT.

    Raises:
        FormatError: a field has another type.
    """
    for field, (expected, fits) in _TYPED.items():
        value = config.get(field)
        if value is not None and not fits(value):
            raise FormatError(
                f"read {source}, {field} of its configuration",
                expected=expected,
                got=brief(repr(value), 80),
                fix="Save the adapter again with save_pretrained.",
            )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_name_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


_NAMES = ("a regular expression or a list of names", _is_name_or_names)
_TYPED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "alpha_pattern": ("an object", lambda value: isinstance(value, dict)),
    "rank_pattern": ("an object", lambda value: isinstance(value, dict)),
    "target_modules": _NAMES,
    "feedforward_modules": _NAMES,
    "target_parameters": ("a list of names", _is_names),
}


def refusals() -> Iterator[tuple[str, _Refusal]]:
    """Yield all methods and options that are refused, as written in adapter_config.json, with reason and fix."""
    for kind, refusal in _TYPES.items():
        yield f"peft_type {kind}", refusal
    for field, refusal in _FIELDS.items():
        yield field, refusal
    for init, refusal in _INITS.items():
        yield f"init_lora_weights={init}", refusal
    yield "peft_type UNILORA with save_indices=false", _NO_INDICES


def _error(source: str, got: str, refusal: _Refusal) -> FormatError:
    return FormatError(
        f"read {source}", expected="an adapter that changes weights", got=f"{got}: {refusal.reason}", fix=refusal.fix
    )

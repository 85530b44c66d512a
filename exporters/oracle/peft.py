"""PEFT as an oracle: a PEFT directory loaded onto the base by PEFT, its adapter not merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

__all__ = ["DISTRIBUTION", "load"]

DISTRIBUTION = "peft"
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load(model: nn.Module, path: Path) -> Callable[..., object]:
    """The forward method of a base that PEFT has given the adapter in a directory.

    Args:
        model: the base, which PEFT changes.
        path: the directory.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: a file is gone, or PEFT ignores a tensor of it.
        Exception: whatever PEFT raises for a directory or a base that it cannot take.
    """
    import peft

    import tpeft_deploy.training  # noqa: F401  # our own method, which importing registers

    for name in _FILES:
        if not (path / name).is_file():  # PEFT would look for it on the network
            raise ValueError(f"{path / name} is no longer there")
    wrapped = peft.PeftModel.from_pretrained(model, str(path), torch_device="cpu", local_files_only=True)
    # Once more, as only this tells which tensors had no place.  The first time has cut AdaLoRA's ranks already.
    if wrapped.peft_config["default"].peft_type == "ADALORA":
        wrapped.peft_config["default"].rank_pattern = None
    ignored = wrapped.load_adapter(str(path), "default", torch_device="cpu", local_files_only=True).unexpected_keys
    if ignored:
        raise ValueError(f"it has no use for tensor {ignored[0]!r}")
    wrapped.eval()
    # That of a subclass for a kind of task passes inputs that the base's forward method may not have.
    return partial(peft.PeftModel.forward, wrapped)

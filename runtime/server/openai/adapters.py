"""Calls of vLLM that load and unload adapters; they name registered adapters, never files of the server."""

from __future__ import annotations

from tpeft_deploy.runtime.server.openai.reading import NAME
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.server.rest.context import HttpContext

__all__ = ["LoadLoraAdapter", "UnloadLoraAdapter", "load_adapter", "unload_adapter"]


class LoadLoraAdapter(Body, forbid_unknown_fields=False):
    """Body of `POST /v1/load_lora_adapter`.

    Attributes:
        lora_name: name of the model.
        lora_path: a task, `TASK@VERSION`, or the digest of a version.
        load_inplace: whether the adapter may replace another one of a model that is loaded.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraAdapter(Body, forbid_unknown_fields=False):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: str


async def load_adapter(context: HttpContext) -> object:
    """Serve `POST /v1/load_lora_adapter`."""
    body = await context.read(LoadLoraAdapter)
    context.task = body.lora_name[:NAME]
    await context.core.repository.load_from(
        context.principal, body.lora_name, body.lora_path, replace=body.load_inplace
    )
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


async def unload_adapter(context: HttpContext) -> object:
    """Serve `POST /v1/unload_lora_adapter`."""
    body = await context.read(UnloadLoraAdapter)
    context.task = body.lora_name[:NAME]
    await context.core.unload(context.principal, body.lora_name, {})
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

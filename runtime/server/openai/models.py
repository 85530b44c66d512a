"""Models in OpenAI's API: the tasks that a key may see."""

from __future__ import annotations

from tpeft_deploy.runtime.server.operations.slices import in_slices
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.v2.messages import Document

__all__ = ["model", "models"]


async def models(context: HttpContext) -> object:
    """Serve `GET /v1/models`: the models that are loaded."""
    found: list[Document] = []
    tasks = await context.core.tasks(context.principal, limit=context.number("limit"), after=context.query("after"))
    ready = context.core.ready()
    loaded = [task for task in tasks if task["ready"] or not ready]
    await in_slices(loaded, lambda task: found.append(_document(task)))
    return {"object": "list", "data": found}


async def model(context: HttpContext) -> object:
    """Serve `GET /v1/models/{model}`."""
    return _document(context.core.task(context.principal, context.path("model")))


def _document(task: Document) -> Document:
    current = task["aliases"].get("current")
    digest = next((one["digest"] for one in task["versions"] if one["version"] == current), None)
    return {
        "id": task["name"],
        "object": "model",
        "created": 0,  # unknown for what the bundle has
        "owned_by": task["tenant"] or "shared",
        "root": digest,
        "parent": None if digest in {None, "base"} else "base",
    }

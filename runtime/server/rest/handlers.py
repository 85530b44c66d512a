"""Handlers of the routes: read the request, call the core, return the response document."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET

from tpeft_deploy.errors import ProtocolError, Unavailable
from tpeft_deploy.runtime.server.rest import bodies
from tpeft_deploy.runtime.server.rest.conditions import condition_of
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.rest.loading import load_parameters, parameters_of
from tpeft_deploy.runtime.server.rest.upload_stream import parts
from tpeft_deploy.runtime.server.v2.tensors import quoted


async def live(context: HttpContext) -> object:
    if not context.core.live():
        raise Unavailable("be live", problem="the server does not work")
    return {"live": True}


async def ready(context: HttpContext) -> object:
    if not context.core.ready():
        raise Unavailable("be ready", problem="the server is starting or draining, or its files are gone")
    return {"ready": True}


async def server(context: HttpContext) -> object:
    return context.core.server_metadata(context.principal)


async def model(context: HttpContext) -> object:
    return context.core.model_metadata(context.principal, context.path("model"), context.path("version"))


async def model_ready(context: HttpContext) -> object:
    name = context.path("model")
    if not context.core.model_ready(context.principal, name, context.path("version")):
        raise Unavailable(f"be ready with model {quoted(name)}", problem="it was unloaded, or the server drains")
    return {"name": name, "ready": True}


async def config(context: HttpContext) -> object:
    return context.core.model_config(context.principal, context.path("model"), context.path("version"))


async def statistics(context: HttpContext) -> object:
    return await context.core.statistics(context.principal, context.path("model"), context.path("version"))


async def index(context: HttpContext) -> object:
    return await context.core.index(context.principal, ready=(await context.read(bodies.Index)).ready)


async def load(context: HttpContext) -> object:
    await context.core.load(context.principal, context.path("model"), await load_parameters(context))
    return None


async def unload(context: HttpContext) -> object:
    await context.core.unload(context.principal, context.path("model"), parameters_of(await context.json()))
    return None


async def tasks(context: HttpContext) -> object:
    return await context.core.tasks(
        context.principal, context.owner, limit=context.number("limit"), after=context.query("after")
    )


async def task(context: HttpContext) -> object:
    return _tagged(context, context.core.task(context.principal, context.path("task"), context.owner))


async def register(context: HttpContext) -> object:
    alias = context.query("alias") or "current"
    condition, task = condition_of(context), context.path("task")
    found = await context.core.register(
        context.principal, task, parts(context), alias=alias, tenant=context.owner, condition=condition
    )
    return _tagged(context, found)


async def point(context: HttpContext) -> object:
    body = await context.read(bodies.Alias)
    task, alias = context.path("task"), context.path("alias")
    version, expected, condition = str(body.version), _expected(body), condition_of(context)
    found = await context.core.point(context.principal, task, alias, version, context.owner, expected, condition)
    return _tagged(context, found)


async def rollback(context: HttpContext) -> object:
    body = await context.read(bodies.Expected)
    task, alias = context.path("task"), context.path("alias")
    condition = condition_of(context)
    found = await context.core.rollback(context.principal, task, alias, context.owner, _expected(body), condition)
    return _tagged(context, found)


async def history(context: HttpContext) -> object:
    limit = context.number("limit")
    task, alias = context.path("task"), context.path("alias")
    found = await context.core.history(context.principal, task, alias, 100 if limit is None else limit, context.owner)
    return list(found)


async def delete(context: HttpContext) -> object:
    task, version = context.path("task"), context.path("version")
    tag = await context.core.delete(context.principal, task, version, context.owner, condition_of(context))
    _tagged(context, {"etag": tag})
    return None


async def publish(context: HttpContext) -> object:
    if context.owner is None:
        raise ProtocolError("publish a task", expected="the query parameter 'tenant'", got="none")
    condition = condition_of(context)
    return _tagged(
        context, await context.core.publish(context.principal, context.path("task"), context.owner, condition)
    )


async def pin(context: HttpContext) -> object:
    folded = (await context.read(bodies.Pin)).folded
    found = await context.core.pin(context.principal, context.path("task"), folded=folded, tenant=context.owner)
    return _tagged(context, found)


async def unpin(context: HttpContext) -> object:
    await context.core.unpin(context.principal, context.path("task"), context.owner)
    return None


async def keys(context: HttpContext) -> object:
    return await context.core.admin.keys(context.principal, context.owner)


async def create_key(context: HttpContext) -> object:
    body = await context.read(bodies.Key)
    expires_in = None if body.expires_in is UNSET else body.expires_in
    return await context.core.admin.create_key(context.principal, body.tenant, body.role, expires_in)


async def revoke_key(context: HttpContext) -> object:
    await context.core.admin.revoke_key(context.principal, context.path("key"))
    return None


async def tenants(context: HttpContext) -> object:
    return await context.core.admin.tenants(context.principal)


async def set_tenant(context: HttpContext) -> object:
    quota = msgspec.to_builtins(await context.read(bodies.QuotaBody))  # omits unset fields
    return await context.core.admin.set_tenant(context.principal, context.path("tenant"), quota)


async def audit(context: HttpContext) -> object:
    limit = context.number("limit")
    found = await context.core.admin.audit(context.principal, 100 if limit is None else limit, context.number("before"))
    return list(found)


async def metrics(context: HttpContext) -> object:
    return await context.core.admin.metrics(context.principal)


def _expected(body: bodies.Expected) -> str | None:
    return None if body.expected is UNSET else str(body.expected)


def _tagged(context: HttpContext, document: Mapping[str, object]) -> Mapping[str, object]:
    """Send the tag of a task as the header ETag; a model of the bundle has none."""
    tag = document["etag"]
    if isinstance(tag, str):
        context.extra.append((b"etag", tag.encode()))
    return document

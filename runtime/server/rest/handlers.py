"""What each route does: read the request, call the core, give back the document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tpeft_deploy.errors import ProtocolError, Unavailable
from tpeft_deploy.runtime.server.operations.slices import in_slices
from tpeft_deploy.runtime.server.rest.context import Asked
from tpeft_deploy.runtime.server.rest.loading import load_parameters, parameters_of
from tpeft_deploy.runtime.server.rest.uploads import parts
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.messages import Document
from tpeft_deploy.runtime.server.v2.tensors import quoted


async def live(asked: Asked) -> object:
    if not asked.core.live():
        raise Unavailable("be live", problem="the server does not work")
    return {"live": True}


async def ready(asked: Asked) -> object:
    if not asked.core.ready():
        raise Unavailable("be ready", problem="the server is starting or draining, or its files are gone")
    return {"ready": True}


async def server(asked: Asked) -> object:
    return asked.core.server_metadata(asked.principal)


async def model(asked: Asked) -> object:
    return asked.core.model_metadata(asked.principal, asked.path("model"), asked.path("version"))


async def model_ready(asked: Asked) -> object:
    name = asked.path("model")
    if not asked.core.model_ready(asked.principal, name, asked.path("version")):
        raise Unavailable(f"be ready with model {quoted(name)}", problem="it was unloaded, or the server drains")
    return {"name": name, "ready": True}


async def config(asked: Asked) -> object:
    return asked.core.model_config(asked.principal, asked.path("model"), asked.path("version"))


async def statistics(asked: Asked) -> object:
    return await asked.core.statistics(asked.principal, asked.path("model"), asked.path("version"))


async def index(asked: Asked) -> object:
    wanted = await asked.fields(ready=bool)
    return await asked.core.index(asked.principal, ready=wanted.get("ready", False))


async def load(asked: Asked) -> object:
    await asked.core.load(asked.principal, asked.path("model"), await load_parameters(asked))
    return None


async def unload(asked: Asked) -> object:
    await asked.core.unload(asked.principal, asked.path("model"), parameters_of(await asked.json()))
    return None


async def openai(asked: Asked) -> object:
    found: list[object] = []

    def show(task: Document) -> None:
        current = task["aliases"].get("current")
        digest = next((one["digest"] for one in task["versions"] if one["version"] == current), None)
        parent = None if digest in {None, "base"} else "base"
        owner = task["tenant"] or "shared"
        found.append({"id": task["name"], "object": "model", "owned_by": owner, "root": digest, "parent": parent})

    tasks = await asked.core.tasks(asked.principal, limit=asked.number("limit"), after=asked.query("after"))
    await in_slices(tasks, show)
    return {"object": "list", "data": found}


async def tasks(asked: Asked) -> object:
    return await asked.core.tasks(
        asked.principal, asked.tenant, limit=asked.number("limit"), after=asked.query("after")
    )


async def task(asked: Asked) -> object:
    return asked.core.task(asked.principal, asked.path("task"), asked.tenant)


async def register(asked: Asked) -> object:
    alias = asked.query("alias") or "current"
    return await asked.core.register(
        asked.principal, asked.path("task"), parts(asked), alias=alias, tenant=asked.tenant
    )


async def point(asked: Asked) -> object:
    wanted = await asked.fields(version=(str, int), expected=(str, int))
    if "version" not in wanted:
        raise ProtocolError("read a body", expected="a field 'version'", got="none")
    task, alias = asked.path("task"), asked.path("alias")
    return await asked.core.point(asked.principal, task, alias, str(wanted["version"]), asked.tenant, _expected(wanted))


async def rollback(asked: Asked) -> object:
    wanted = await asked.fields(expected=(str, int))
    task, alias = asked.path("task"), asked.path("alias")
    return await asked.core.rollback(asked.principal, task, alias, asked.tenant, _expected(wanted))


async def history(asked: Asked) -> object:
    limit = asked.number("limit")
    task, alias = asked.path("task"), asked.path("alias")
    found = await asked.core.history(asked.principal, task, alias, 100 if limit is None else limit, asked.tenant)
    return list(found)


async def delete(asked: Asked) -> object:
    await asked.core.delete(asked.principal, asked.path("task"), asked.path("version"), asked.tenant)
    return None


async def publish(asked: Asked) -> object:
    if asked.tenant is None:
        raise ProtocolError("publish a task", expected="the query parameter 'tenant'", got="none")
    return await asked.core.publish(asked.principal, asked.path("task"), asked.tenant)


async def pin(asked: Asked) -> object:
    wanted = await asked.fields(folded=bool)
    return await asked.core.pin(
        asked.principal, asked.path("task"), folded=wanted.get("folded", False), tenant=asked.tenant
    )


async def unpin(asked: Asked) -> object:
    await asked.core.unpin(asked.principal, asked.path("task"), asked.tenant)
    return None


async def keys(asked: Asked) -> object:
    return await asked.core.admin.keys(asked.principal, asked.tenant)


async def create_key(asked: Asked) -> object:
    wanted = await asked.fields(tenant=str, role=str, expires_in=(int, float))
    if not {"tenant", "role"} <= set(wanted):
        raise ProtocolError("read a body", expected="fields 'tenant' and 'role'", got=", ".join(wanted) or "none")
    return await asked.core.admin.create_key(
        asked.principal, wanted["tenant"], wanted["role"], wanted.get("expires_in")
    )


async def revoke_key(asked: Asked) -> object:
    await asked.core.admin.revoke_key(asked.principal, asked.path("key"))
    return None


async def tenants(asked: Asked) -> object:
    return await asked.core.admin.tenants(asked.principal)


async def set_tenant(asked: Asked) -> object:
    number = (int, float, type(None))
    names = [limit.name for limit in fields(Quota)]
    return await asked.core.admin.set_tenant(
        asked.principal, asked.path("tenant"), await asked.fields(**dict.fromkeys(names, number))
    )


async def audit(asked: Asked) -> object:
    limit = asked.number("limit")
    found = await asked.core.admin.audit(asked.principal, 100 if limit is None else limit, asked.number("before"))
    return list(found)


async def metrics(asked: Asked) -> object:
    return await asked.core.admin.metrics(asked.principal)


def _expected(wanted: Mapping[str, Any]) -> str | None:
    return str(wanted["expected"]) if "expected" in wanted else None

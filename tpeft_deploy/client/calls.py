"""Calls for everything but inference; the clients' methods of the same names send and document them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tpeft_deploy.client.answers import Answer, Document, document, documents, nothing
from tpeft_deploy.client.body import RequestBody
from tpeft_deploy.client.exchange import Payload, ServerCall
from tpeft_deploy.client.uploads import AdapterUpload
from tpeft_deploy.client.url import model_path, part

__all__ = [
    "audit",
    "create_key",
    "delete",
    "history",
    "keys",
    "live",
    "metadata",
    "pin",
    "point",
    "publish",
    "ready",
    "register",
    "revoke_key",
    "rollback",
    "set_tenant",
    "statistics",
    "task",
    "tasks",
    "tenants",
    "unpin",
]

_TASKS = "/v2/registry/tasks"
_ADMIN = "/v2/admin"
_DONE = (200, 201, 204)


def live() -> ServerCall[bool]:
    return ServerCall("ask whether the server lives", "GET", "/v2/health/live", _is_200, statuses=(200, 400, 503))


def ready(name: str | None) -> ServerCall[bool]:
    path = "/v2/health/ready" if name is None else f"{model_path(name)}/ready"
    return ServerCall("ask whether the server is ready", "GET", path, _is_200, statuses=(200, 400, 503))


def metadata(name: str | None) -> ServerCall[Document]:
    path = "/v2" if name is None else model_path(name)
    return ServerCall("ask for metadata", "GET", path, document)


def statistics(name: str | None) -> ServerCall[Document]:
    path = "/v2/models/stats" if name is None else f"{model_path(name)}/stats"
    return ServerCall("ask for statistics", "GET", path, document)


def tasks(tenant: str | None) -> ServerCall[list[Document]]:
    return ServerCall("list tasks", "GET", _TASKS, documents, _tenant(tenant))


def task(name: str, tenant: str | None) -> ServerCall[Document]:
    return ServerCall(f"ask for task {name!r}", "GET", _task(name), document, _tenant(tenant))


def register(
    name: str,
    path: str | os.PathLike[str],
    alias: str,
    tenant: str | None,
    if_match: str | None = None,
    if_none_match: bool = False,
) -> ServerCall[Document]:
    query = {"alias": alias, **_tenant(tenant)}
    upload = AdapterUpload(Path(path))
    doing = f"register task {name!r}"
    headers = {**_if_match(if_match), **({"If-None-Match": "*"} if if_none_match else {})}
    return _change(doing, "POST", f"{_task(name)}/versions", query, upload=upload, headers=headers)


def point(
    name: str,
    alias: str,
    version: int | str,
    tenant: str | None,
    expected: int | str | None = None,
    if_match: str | None = None,
) -> ServerCall[Document]:
    doing = f"point alias {alias!r} of task {name!r} to {version}"
    content, headers = {"version": str(version), **_expected(expected)}, _if_match(if_match)
    return _change(doing, "PUT", _alias(name, alias), _tenant(tenant), content, headers=headers)


def rollback(
    name: str, alias: str, tenant: str | None, expected: int | str | None = None, if_match: str | None = None
) -> ServerCall[Document]:
    doing = f"roll back alias {alias!r} of task {name!r}"
    path, content, headers = f"{_alias(name, alias)}/rollback", _expected(expected), _if_match(if_match)
    return _change(doing, "POST", path, _tenant(tenant), content, headers=headers)


def history(name: str, alias: str, limit: int, tenant: str | None) -> ServerCall[list[Document]]:
    doing = f"ask for the history of alias {alias!r} of task {name!r}"
    query = {"limit": str(limit), **_tenant(tenant)}
    return ServerCall(doing, "GET", f"{_alias(name, alias)}/history", documents, query)


def delete(
    name: str, version: int | str | None, tenant: str | None, if_match: str | None = None
) -> ServerCall[str | None]:
    path = _task(name) if version is None else f"{_task(name)}/versions/{part(str(version), 'version')}"
    headers = _if_match(if_match)
    return ServerCall(
        f"delete task {name!r}", "DELETE", path, _tag, _tenant(tenant), headers=headers, changes=True, statuses=_DONE
    )


def publish(name: str, tenant: str | None, if_match: str | None = None) -> ServerCall[Document]:
    path, headers = f"{_task(name)}/publish", _if_match(if_match)
    return _change(f"publish task {name!r}", "POST", path, _tenant(tenant), headers=headers)


def pin(name: str, folded: bool, tenant: str | None) -> ServerCall[Document]:
    return _change(f"pin task {name!r}", "PUT", f"{_task(name)}/pin", _tenant(tenant), {"folded": folded})


def unpin(name: str, tenant: str | None) -> ServerCall[None]:
    path = f"{_task(name)}/pin"
    return ServerCall(f"unpin task {name!r}", "DELETE", path, nothing, _tenant(tenant), changes=True, statuses=_DONE)


def keys(tenant: str | None) -> ServerCall[list[Document]]:
    return ServerCall("list keys", "GET", f"{_ADMIN}/keys", documents, _tenant(tenant))


def create_key(tenant: str, role: str, expires_in: float | None) -> ServerCall[Document]:
    asked = {"tenant": tenant, "role": role} | ({} if expires_in is None else {"expires_in": expires_in})
    return _change(f"create a key of tenant {tenant!r}", "POST", f"{_ADMIN}/keys", {}, asked)


def revoke_key(key: str) -> ServerCall[None]:
    path = f"{_ADMIN}/keys/{part(key, 'key')}"
    return ServerCall(f"revoke key {key!r}", "DELETE", path, nothing, changes=True, statuses=_DONE)


def tenants() -> ServerCall[list[Document]]:
    return ServerCall("list tenants", "GET", f"{_ADMIN}/tenants", documents)


def set_tenant(tenant: str, quota: Mapping[str, float | None]) -> ServerCall[Document]:
    return _change(f"set tenant {tenant!r}", "PUT", f"{_ADMIN}/tenants/{part(tenant, 'tenant')}", {}, dict(quota))


def audit(limit: int, before: int | None) -> ServerCall[list[Document]]:
    query = {"limit": str(limit)} | ({} if before is None else {"before": str(before)})
    return ServerCall("read the audit log", "GET", f"{_ADMIN}/audit", documents, query)


def _change(
    doing: str,
    method: str,
    path: str,
    query: Mapping[str, str],
    content: Mapping[str, object] | None = None,
    upload: AdapterUpload | None = None,
    headers: Mapping[str, str] | None = None,
) -> ServerCall[Document]:
    payload = upload.payload if upload is not None else partial(_json, {} if content is None else content)
    return ServerCall(doing, method, path, document, query, payload, headers or {}, changes=True, statuses=_DONE)


def _expected(version: int | str | None) -> dict[str, object]:
    return {} if version is None else {"expected": str(version)}


def _if_match(tag: str | None) -> dict[str, str]:
    return {} if tag is None else {"If-Match": tag}


def _tag(answer: Answer) -> str | None:
    return answer.headers.get("ETag")


def _json(content: Mapping[str, object], left: float | None) -> Payload:
    return Payload({"Content-Type": "application/json"}, RequestBody([json.dumps(content).encode()]))


def _is_200(answer: Answer) -> bool:
    return answer.status == 200


def _task(name: str) -> str:
    return f"{_TASKS}/{part(name, 'task')}"


def _alias(name: str, alias: str) -> str:
    return f"{_task(name)}/aliases/{part(alias, 'alias')}"


def _tenant(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"tenant": tenant}

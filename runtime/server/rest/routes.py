"""Table of all routes except inference; routing, roles and the OpenAPI document are derived from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from tpeft_deploy.runtime.server.rest import bodies, handlers
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.tenancy.access import Action

__all__ = ["ROUTES", "Route"]

Handler = Callable[[HttpContext], Awaitable[object]]


@dataclass(frozen=True)
class Route:
    """One operation over HTTP.

    Attributes:
        method: HTTP method.
        path: path template.
        action: action that the role must allow.
        handler: returns the response document; bytes are text, None is an empty object.
        summary: summary for OpenAPI.
        query: query parameter -> description.
        body: type of the JSON body, or None.
        upload: whether the body is an upload.
    """

    method: str
    path: str
    action: Action
    handler: Handler
    summary: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: type[bodies.Body] | None = None
    upload: bool = False


_TENANT = {"tenant": 'whose task is meant; only an admin may name another\'s, or "shared"'}
_PAGE = {"limit": "how many, all unless given", "after": "only those that follow the one of this name"}
_TASK = "/v2/registry/tasks/{task}"


def _of_models(suffix: str, handler: Handler, summary: str) -> list[Route]:
    paths = (f"/v2/models/{{model}}{suffix}", f"/v2/models/{{model}}/versions/{{version}}{suffix}")
    return [Route("GET", path, Action.READ, handler, summary) for path in paths]


ROUTES: tuple[Route, ...] = (
    Route("GET", "/v2/health/live", Action.HEALTH, handlers.live, "Whether the process works"),
    Route("GET", "/v2/health/ready", Action.HEALTH, handlers.ready, "Whether requests are taken"),
    Route("GET", "/v2", Action.READ, handlers.server, "Name, version and extensions of the server"),
    Route("GET", "/v2/models/stats", Action.READ, handlers.statistics, "What all models have answered"),
    *_of_models("", handlers.model, "Inputs and outputs of a model"),
    *_of_models("/ready", handlers.model_ready, "Whether a model would answer"),
    *_of_models("/config", handlers.config, "A model's configuration, as Triton's ModelConfig"),
    *_of_models("/stats", handlers.statistics, "What a model has answered"),
    Route("POST", "/v2/repository/index", Action.READ, handlers.index, "Models and their states", body=bodies.Index),
    Route(
        "POST",
        "/v2/repository/models/{model}/load",
        Action.DEPLOY,
        handlers.load,
        "Make a model ready",
        body=bodies.Parameters,
    ),
    Route(
        "POST",
        "/v2/repository/models/{model}/unload",
        Action.DEPLOY,
        handlers.unload,
        "Refuse requests for a model",
        body=bodies.Parameters,
    ),
    Route("GET", "/v1/models", Action.READ, handlers.openai, "Models, as OpenAI's API lists them", _PAGE),
    Route(
        "GET",
        "/v2/registry/tasks",
        Action.READ,
        handlers.tasks,
        "Tasks, versions, aliases and where they are",
        {**_TENANT, **_PAGE},
    ),
    Route("GET", _TASK, Action.READ, handlers.task, "One task", _TENANT),
    Route(
        "POST",
        f"{_TASK}/versions",
        Action.DEPLOY,
        handlers.register,
        "Register a new version from an upload",
        {**_TENANT, "alias": 'what is to stand for the new version; "current" unless given'},
        upload=True,
    ),
    Route(
        "PUT",
        f"{_TASK}/aliases/{{alias}}",
        Action.DEPLOY,
        handlers.point,
        "Let an alias stand for a version",
        _TENANT,
        bodies.Alias,
    ),
    Route(
        "POST",
        f"{_TASK}/aliases/{{alias}}/rollback",
        Action.DEPLOY,
        handlers.rollback,
        "Undo the last change of an alias",
        _TENANT,
        bodies.Expected,
    ),
    Route(
        "GET",
        f"{_TASK}/aliases/{{alias}}/history",
        Action.READ,
        handlers.history,
        "What an alias stood for, the newest first",
        {**_TENANT, "limit": "how many, 100 unless given, which is the most"},
    ),
    Route("DELETE", _TASK, Action.DEPLOY, handlers.delete, "Delete a task", _TENANT),
    Route("DELETE", f"{_TASK}/versions/{{version}}", Action.DEPLOY, handlers.delete, "Delete a version", _TENANT),
    Route("POST", f"{_TASK}/publish", Action.ADMIN, handlers.publish, "Give a tenant's task to all", _TENANT),
    Route("PUT", f"{_TASK}/pin", Action.DEPLOY, handlers.pin, "Keep a task on the device", _TENANT, bodies.Pin),
    Route("DELETE", f"{_TASK}/pin", Action.DEPLOY, handlers.unpin, "Let a task leave the device", _TENANT),
    Route(
        "GET", "/v2/admin/keys", Action.ADMIN, handlers.keys, "Keys, without their secrets", {"tenant": "of one tenant"}
    ),
    Route("POST", "/v2/admin/keys", Action.ADMIN, handlers.create_key, "A new key, shown this once", body=bodies.Key),
    Route("DELETE", "/v2/admin/keys/{key}", Action.ADMIN, handlers.revoke_key, "Revoke a key"),
    Route("GET", "/v2/admin/tenants", Action.ADMIN, handlers.tenants, "Tenants, their quotas and what they use"),
    Route(
        "PUT",
        "/v2/admin/tenants/{tenant}",
        Action.ADMIN,
        handlers.set_tenant,
        "Set a tenant's quotas",
        body=bodies.Quota,
    ),
    Route(
        "GET",
        "/v2/admin/audit",
        Action.ADMIN,
        handlers.audit,
        "Changes, the newest first",
        {"limit": "how many, 100 unless given", "before": "only those with a smaller id"},
    ),
    Route(
        "GET",
        "/metrics",
        Action.READ,
        handlers.metrics,
        "Metrics for Prometheus; for admins unless configured otherwise",
    ),
)

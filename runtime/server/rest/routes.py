"""Table of all routes except inference; defines routing, roles and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from tpeft_deploy.runtime.server.openai import adapters, encoders, endpoints, models, tokens
from tpeft_deploy.runtime.server.openai.bodies import CompletionBody
from tpeft_deploy.runtime.server.openai.chat_body import ChatBody
from tpeft_deploy.runtime.server.openai.text_bodies import ClassifyBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from tpeft_deploy.runtime.server.rest import bodies, generate, handlers
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.tenancy.access import Action
from tpeft_deploy.runtime.server.v2.generate import GenerateRequest

__all__ = ["ROUTES", "Route"]

Handler = Callable[[HttpContext], Awaitable[object]]


@dataclass(frozen=True)
class Route:
    """One operation over HTTP.

    Attributes:
        method: HTTP method.
        path: path template.
        action: action that the role must allow.
        handler: returns the response document; bytes are metrics, `str` is text, `msgspec.Raw` is JSON, None is an
            empty object, and an `EventStream` is sent as it comes.
        summary: summary for OpenAPI.
        query: query parameter -> description.
        body: type of the JSON body, or None.
        upload: whether the body is an upload.
        streams: whether the response may be a stream of events.
        text: whether the response is text.
        tagged: whether the response has the entity tag of a task.
        conditional: whether the request may have the headers If-Match and If-None-Match.
    """

    method: str
    path: str
    action: Action
    handler: Handler
    summary: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: type[bodies.Body] | None = None
    upload: bool = False
    streams: bool = False
    text: bool = False
    tagged: bool = False
    conditional: bool = False


_TENANT = {"tenant": 'owner of the task (default: the key\'s tenant); another one, or "shared", needs the role admin'}
_PAGE = {"limit": "maximum number of entries (default: all)", "after": "name after which the page starts"}
_TASK = "/v2/registry/tasks/{task}"


def _of_models(suffix: str, handler: Handler, summary: str) -> list[Route]:
    return [Route("GET", path, Action.READ, handler, summary) for path in _paths(suffix)]


def _of_text(suffix: str, handler: Handler, summary: str, *, streams: bool = False) -> list[Route]:
    paths = _paths(suffix)
    return [
        Route("POST", path, Action.INFER, handler, summary, body=GenerateRequest, streams=streams) for path in paths
    ]


def _paths(suffix: str) -> tuple[str, str]:
    return f"/v2/models/{{model}}{suffix}", f"/v2/models/{{model}}/versions/{{version}}{suffix}"


def _of_texts(name: str, handler: Handler, summary: str, body: type[bodies.Body]) -> Route:
    return Route("POST", f"/v1/{name}", Action.INFER, handler, summary, body=body)


ROUTES: tuple[Route, ...] = (
    Route("GET", "/v2/health/live", Action.HEALTH, handlers.live, "Liveness"),
    Route("GET", "/v2/health/ready", Action.HEALTH, handlers.ready, "Readiness"),
    Route("GET", "/v2", Action.READ, handlers.server, "Name, version and extensions of the server"),
    Route("GET", "/v2/models/stats", Action.READ, handlers.statistics, "Inference statistics of all models"),
    *_of_models("", handlers.model, "Metadata of a model: inputs and outputs"),
    *_of_models("/ready", handlers.model_ready, "Readiness of a model"),
    *_of_models("/config", handlers.config, "Configuration of a model in the form of Triton's ModelConfig"),
    *_of_models("/stats", handlers.statistics, "Inference statistics of a model"),
    *_of_text("/generate", generate.generate, "Continue a text, as Triton's generate extension does"),
    *_of_text("/generate_stream", generate.generate_stream, "Continue a text as a stream of events", streams=True),
    Route("POST", "/v2/repository/index", Action.READ, handlers.index, "List models by state", body=bodies.Index),
    Route(
        "POST",
        "/v2/repository/models/{model}/load",
        Action.DEPLOY,
        handlers.load,
        "Load a model",
        body=bodies.Parameters,
    ),
    Route(
        "POST",
        "/v2/repository/models/{model}/unload",
        Action.DEPLOY,
        handlers.unload,
        "Unload a model: refuse requests for it until it is loaded",
        body=bodies.Parameters,
    ),
    Route("GET", "/v1/models", Action.READ, models.models, "List models in the form of OpenAI's API", _PAGE),
    Route("GET", "/v1/models/{model}", Action.READ, models.model, "Get a model in the form of OpenAI's API"),
    Route(
        "POST",
        "/v1/chat/completions",
        Action.INFER,
        endpoints.chat,
        "Answer a conversation, as OpenAI's API does",
        body=ChatBody,
        streams=True,
    ),
    Route(
        "POST",
        "/v1/completions",
        Action.INFER,
        endpoints.completions,
        "Continue prompts, as OpenAI's API does",
        body=CompletionBody,
        streams=True,
    ),
    _of_texts("embeddings", encoders.embeddings, "Embed texts, as OpenAI's API does", EmbeddingBody),
    _of_texts("classify", encoders.classify, "Classify texts or pairs of texts", ClassifyBody),
    _of_texts("tokenize", tokens.tokenize, "Get the tokens of a text or a chat, as vLLM's API does", TokenizeBody),
    _of_texts("detokenize", tokens.detokenize, "Get the text of tokens, as vLLM's API does", DetokenizeBody),
    Route(
        "POST",
        "/v1/load_lora_adapter",
        Action.DEPLOY,
        adapters.load_adapter,
        "Load a model with a registered adapter, as vLLM does",
        body=adapters.LoadLoraAdapter,
        text=True,
    ),
    Route(
        "POST",
        "/v1/unload_lora_adapter",
        Action.DEPLOY,
        adapters.unload_adapter,
        "Unload a model, as vLLM does",
        body=adapters.UnloadLoraAdapter,
        text=True,
    ),
    Route(
        "GET",
        "/v2/registry/tasks",
        Action.READ,
        handlers.tasks,
        "List tasks with versions, aliases and residency",
        {**_TENANT, **_PAGE},
    ),
    Route("GET", _TASK, Action.READ, handlers.task, "Get a task", _TENANT, tagged=True),
    Route(
        "POST",
        f"{_TASK}/versions",
        Action.DEPLOY,
        handlers.register,
        "Register a new version from an upload",
        {**_TENANT, "alias": 'alias to point at the new version (default: "current")'},
        upload=True,
        tagged=True,
        conditional=True,
    ),
    Route(
        "PUT",
        f"{_TASK}/aliases/{{alias}}",
        Action.DEPLOY,
        handlers.point,
        "Point an alias at a version",
        _TENANT,
        bodies.Alias,
        tagged=True,
        conditional=True,
    ),
    Route(
        "POST",
        f"{_TASK}/aliases/{{alias}}/rollback",
        Action.DEPLOY,
        handlers.rollback,
        "Point an alias back at its previous version",
        _TENANT,
        bodies.Expected,
        tagged=True,
        conditional=True,
    ),
    Route(
        "GET",
        f"{_TASK}/aliases/{{alias}}/history",
        Action.READ,
        handlers.history,
        "List the versions of an alias, newest first",
        {**_TENANT, "limit": "maximum number of entries, at most 100 (default: 100)"},
    ),
    Route("DELETE", _TASK, Action.DEPLOY, handlers.delete, "Delete a task", _TENANT, conditional=True),
    Route(
        "DELETE",
        f"{_TASK}/versions/{{version}}",
        Action.DEPLOY,
        handlers.delete,
        "Delete a version",
        _TENANT,
        tagged=True,
        conditional=True,
    ),
    Route(
        "POST",
        f"{_TASK}/publish",
        Action.ADMIN,
        handlers.publish,
        "Share a task with all tenants",
        _TENANT,
        tagged=True,
        conditional=True,
    ),
    Route(
        "PUT",
        f"{_TASK}/pin",
        Action.DEPLOY,
        handlers.pin,
        "Pin a task on the device",
        _TENANT,
        bodies.Pin,
        tagged=True,
    ),
    Route("DELETE", f"{_TASK}/pin", Action.DEPLOY, handlers.unpin, "Unpin a task", _TENANT),
    Route(
        "GET",
        "/v2/admin/keys",
        Action.ADMIN,
        handlers.keys,
        "List keys without their secrets",
        {"tenant": "tenant of the keys (default: all)"},
    ),
    Route(
        "POST",
        "/v2/admin/keys",
        Action.ADMIN,
        handlers.create_key,
        "Create a key; only this response has it",
        body=bodies.Key,
    ),
    Route("DELETE", "/v2/admin/keys/{key}", Action.ADMIN, handlers.revoke_key, "Revoke a key"),
    Route("GET", "/v2/admin/tenants", Action.ADMIN, handlers.tenants, "List tenants with quotas and usage"),
    Route(
        "PUT",
        "/v2/admin/tenants/{tenant}",
        Action.ADMIN,
        handlers.set_tenant,
        "Set the quotas of a tenant",
        body=bodies.QuotaBody,
    ),
    Route(
        "GET",
        "/v2/admin/audit",
        Action.ADMIN,
        handlers.audit,
        "List registry changes, newest first",
        {"limit": "maximum number of entries (default: 100)", "before": "id before which the page starts"},
    ),
    Route(
        "GET",
        "/metrics",
        Action.READ,
        handlers.metrics,
        "Metrics in the Prometheus text format; needs the role admin unless configured otherwise",
        text=True,
    ),
)

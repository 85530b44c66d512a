"""Listener on the loopback for a model agent, such as KServe's, which sends no key.

The agent downloads each adapter into a directory and then asks for it by name. It has a port for itself, as a proxy in
the same pod sends the requests of others from the loopback, too: the address of a connection says nothing there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import InputError, NotFound, ServerError
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.transport.listener import HttpServer
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role
from tpeft_deploy.runtime.server.tenancy.local_only import check
from tpeft_deploy.runtime.server.v2.messages import UploadPart
from tpeft_deploy.runtime.server.v2.statuses import status_of

__all__ = ["AgentDirectory", "agent_application", "agent_server", "listening"]

_HOST = "127.0.0.1"
_CHUNK = 1 << 20
_KEY = "model-agent"  # in the audit log, where other changes have the id of a key
_Handler = Callable[[Request], Awaitable[None]]


class AgentDirectory:
    """Adapters in a directory, each in a folder of the name of its model.

    Args:
        directory: the directory; the only path that may lead over a link.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def parts(self, name: str) -> AsyncIterator[UploadPart]:
        """Yield the files of an adapter as the parts of an upload; other files are ignored.

        Args:
            name: name of the model.

        Raises:
            InputError: the string is no name of a model, or the folder holds no safetensors file.
            NotFound: there is no such folder.
        """
        with contextlib.ExitStack() as stack:
            found = await asyncio.to_thread(self._opened, name, stack)
            if "weights" not in {part for part, _ in found}:
                raise InputError(f"load model {name!r}", expected="a file *.safetensors", got="none")
            for part, file in found:
                yield part, _chunks(file)

    def _opened(self, name: str, stack: contextlib.ExitStack) -> list[tuple[str, BinaryIO]]:
        doing = "load a model of the agent"
        if not is_name(name):
            raise InputError(doing, expected="the name of a model", got=repr(name[:100]))
        try:
            with _folder(self._directory) as root, _folder(name, root) as folder:
                names = sorted(os.listdir(folder))
                return [(part, _file(own, folder, stack)) for own in names if (part := _part(own)) is not None]
        except OSError as error:
            problem = f"its folder cannot be read: {error.strerror}"
            raise NotFound(f"{doing}, {name!r}", problem=problem, fix="Let the agent download it again.") from None


def agent_application(service: Service, directory: AgentDirectory, tenant: str, readers: int) -> Starlette:
    """Return the ASGI application of the agent's listener: load and unload, and nothing else.

    Args:
        service: the server's operations.
        directory: adapters that may be loaded.
        tenant: owner of what is loaded.
        readers: number of adapters that are read at the same time; further calls wait.
    """
    principal = Principal(tenant, Role.DEPLOY, _KEY)
    turns = asyncio.Semaphore(readers)  # an agent asks for all models at once when it starts, and asks only once

    async def load(request: Request) -> None:
        name = request.path_params["model"]
        async with turns:
            await service.repository.load_upload(principal, name, directory.parts(name))

    async def unload(request: Request) -> None:
        await service.unload(principal, request.path_params["model"], {})

    path = "/v2/repository/models/{model}"
    return Starlette(
        routes=[
            Route(f"{path}/load", _answered(load), methods=["POST"]),
            Route(f"{path}/unload", _answered(unload), methods=["POST"]),
        ]
    )


def agent_server(service: Service, settings: Settings) -> HttpServer | None:
    """Return the agent's HTTP server; None if the settings have no directory for it."""
    if settings.agent_models is None:
        return None
    application = agent_application(
        service, AgentDirectory(settings.agent_models), settings.agent_tenant, settings.upload_readers
    )
    config = uvicorn.Config(
        application,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    return HttpServer(config, replace(settings.patience, per_address=0))


def listening(settings: Settings) -> socket.socket | None:
    """Return the agent's listening socket; None if the settings have no directory for it.

    Raises:
        ServerError: something else listens there.
    """
    if settings.agent_models is None:
        return None
    try:
        return socket.create_server((_HOST, settings.agent_port))
    except OSError as error:
        raise ServerError(
            f"listen on {_HOST}:{settings.agent_port} for a model agent",
            problem=error.strerror or str(error),
            fix="Set another agent_port, or stop what listens there.",
        ) from None


def _answered(handler: _Handler) -> Callable[[Request], Awaitable[JSONResponse]]:
    async def endpoint(request: Request) -> JSONResponse:
        try:
            check(request.scope["headers"])  # no page in a browser reaches this through a name that resolves to it
            await handler(request)
        except Exception as error:
            status = status_of(error)
            return JSONResponse({"error": status.text}, status.http)
        return JSONResponse({})

    return endpoint


def _part(file: str) -> str | None:
    if file == "adapter_config.json":
        return "config"
    return "weights" if file.endswith(".safetensors") else None


@contextlib.contextmanager
def _folder(path: Path | str, parent: int | None = None) -> Iterator[int]:
    """Open a folder; below another one, links are refused."""
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if parent is None else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _file(name: str, folder: int, stack: contextlib.ExitStack) -> BinaryIO:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    file = stack.enter_context(os.fdopen(descriptor, "rb"))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(0, "not a regular file")
    return file


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while data := await asyncio.to_thread(file.read, _CHUNK):
        yield data

"""Server process: start-up, serving, and graceful shutdown on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.types import Receive, Scope, Send

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime import Limits, Runtime
from tpeft_deploy.runtime.heap import settle_heap
from tpeft_deploy.runtime.server import model_agent
from tpeft_deploy.runtime.server.certificates import Certificates
from tpeft_deploy.runtime.server.console.files import Console
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.isolation.pool import Pool
from tpeft_deploy.runtime.server.operations.options import Options, order_of
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.registry import State, open_state
from tpeft_deploy.runtime.server.rest.app import application
from tpeft_deploy.runtime.server.rest.transport.listener import HttpServer
from tpeft_deploy.runtime.server.rpc.server import RpcServer, Tls
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.settings import Settings, is_loopback
from tpeft_deploy.runtime.server.telemetry.access_log import AccessLog
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines, QueuedHandler
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics
from tpeft_deploy.runtime.server.telemetry.tracing import tracing
from tpeft_deploy.runtime.server.tenancy.fair_order import Orders
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.tenancy.local_only import LocalOnly
from tpeft_deploy.runtime.server.v2.limits import RestLimits, RpcLimits
from tpeft_deploy.runtime.sessions.providers import choose

__all__ = ["open_service", "rest_application", "rpc_server", "serve"]

_log = logging.getLogger("tpeft_deploy.server")
_GRPC_BYTES = 4 << 20
_RENEW_SECONDS = 5.0


def serve(bundle: Path, settings: Settings, say: Callable[[str], None] | None = None) -> None:
    """Serve a bundle until SIGTERM or SIGINT; a second one ends the process at once.

    Args:
        bundle: directory of the bundle.
        settings: server settings.
        say: called with a line each for the listening address, the provider, and the shutdown (default: writes them to
            stderr).

    Raises:
        BundleError, ProviderUnavailable, ServerError, Conflict: the server cannot start.
    """
    certificates = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        certificates = Certificates(settings.tls_cert, settings.tls_key)
    with closing(LogLines()) as lines:
        _serve(bundle, settings, certificates, say or lines.say, lines)


def _serve(
    bundle: Path,
    settings: Settings,
    certificates: Certificates | None,
    say: Callable[[str], None],
    lines: LogLines,
) -> None:
    with _listening(settings.host, settings.port) as listener, ExitStack() as stack:
        stack.enter_context(_logging(settings, lines))
        agent = model_agent.listening(settings)
        if agent is not None:
            stack.enter_context(agent)
        service, metrics, runtime = _open(bundle, settings, stack, lines)
        log = AccessLog(lines) if settings.access_log else None

        def observe(context: RequestContext) -> None:
            metrics.request(context)
            if log is not None:
                log.write(context)

        say(f"provider: {runtime.provider} ({runtime.provider_reason})")
        if settings.tls_cert is None and not is_loopback(settings.host):
            say(
                f"WARNING: no TLS on {_shown(settings.host)}: keys and tensors travel as plain text. "
                "Give --tls-cert and --tls-key, or let nothing but a proxy with TLS reach this port."
            )
        if settings.metrics_port is not None:
            port = _serve_metrics(metrics, settings.host, settings.metrics_port, stack)
            say(f"serving metrics without a key on http://{_shown(settings.host)}:{port}")
        with asyncio.Runner(loop_factory=_loop()) as runner:
            runner.run(_run(service, settings, (listener, agent), observe, say, certificates))
    say("stopped")


def _serve_metrics(metrics: Metrics, host: str, port: int, stack: ExitStack) -> int:
    server = metrics.listen(host, port)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return server.server_port


@contextmanager
def _logging(settings: Settings, lines: LogLines) -> Iterator[None]:
    handler = QueuedHandler(lines)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


def _open(path: Path, settings: Settings, stack: ExitStack, lines: LogLines) -> tuple[Service, Metrics, Runtime]:
    bundle = Bundle.open(path.resolve())
    state = stack.enter_context(
        open_state(
            settings.state,
            settings.database_url,
            default=settings.quota,
            **settings.store_options,
        )
    )
    limits = settings.limits(bundle, choose(settings.provider, allow_tf32=settings.allow_tf32).device)
    order = order_of(state, limits)
    runtime = stack.enter_context(
        Runtime(
            path,
            **settings.runtime_options,
            limits=limits,
            order=order,
            sequence_order=order.sequences,
        )
    )
    service, metrics = open_service(runtime, bundle, state, order, limits, settings, stack, lines)
    return service, metrics, runtime


def open_service(
    runtime: Runtime,
    bundle: Bundle,
    state: State,
    order: Orders,
    limits: Limits,
    settings: Settings,
    stack: ExitStack,
    lines: LogLines,
) -> tuple[Service, Metrics]:
    """Create the service on a runtime, and its metrics; `stack` closes what it opens.

    Args:
        runtime: the runtime, or what stands for one on other machines.
        bundle: the bundle.
        state: the registry.
        order: orders of the runtime's queues.
        limits: limits of batching.
        settings: server settings.
        stack: closed when the server ends.
        lines: writer of log lines.
    """
    metrics = Metrics(
        settings.max_task_series,
        runtime.residency,
        runtime.usage,
        lambda: runtime.batching().waiting_rows,
        lambda: lines.dropped,
        runtime.generation,
        runtime.pins,
        runtime.ranks,
    )
    traced = tracing()

    def observe(event: InferenceEvent) -> None:
        metrics.inference(event)
        if traced is not None:
            traced.inference(event)

    pools = Pools()
    stack.callback(pools.close)
    options = Options(
        pools=pools,
        limits=limits,
        authenticate=not settings.no_auth,
        max_upload_bytes=settings.max_upload_bytes,
        reader=stack.enter_context(closing(Pool(bundle, settings.reading))),
        max_folded=settings.max_folded_in_all,
        metrics=metrics.render,
        metrics_for_all=settings.metrics_for_all_keys,
        changes_per_s=settings.changes_per_s or None,
        audit_days=settings.audit_days or None,
        audit_rows=settings.audit_rows or None,
        observe=observe,
        forget=metrics.drop,
    )
    service = Service(runtime, bundle, state, order, options)
    metrics.lease = service.lease
    return service, metrics


async def _run(
    service: Service,
    settings: Settings,
    listeners: tuple[socket.socket, socket.socket | None],
    observe: Callable[[RequestContext], None],
    say: Callable[[str], None],
    certificates: Certificates | None,
) -> None:
    intake = settings.intake
    http = _http(service, settings, observe, intake)
    grpc = rpc_server(service, settings, observe, intake, certificates)
    if certificates is not None:
        http.tls = certificates.context
    stop = asyncio.Event()
    _on_signals(stop)
    listener, for_agent = listeners
    agent = None if for_agent is None else model_agent.agent_server(service, settings)
    serving = asyncio.create_task(http.serve([listener]))
    loading = None if agent is None or for_agent is None else asyncio.create_task(agent.serve([for_agent]))
    if grpc is not None:
        await grpc.start()
    while not http.started and not serving.done():
        await asyncio.sleep(0.01)
    if serving.done():
        await serving  # raises the reason why it did not start
    settle_heap()
    _say_where(settings, listeners, grpc, say)
    sweeping = asyncio.create_task(service.sweep())
    leasing = asyncio.create_task(service.renew_lease())
    renewing = asyncio.create_task(_renewing(certificates, http, grpc))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, serving], return_when=asyncio.FIRST_COMPLETED)
    service.drain()
    late = f", and what comes within {settings.drain_grace:g} s" if settings.drain_grace else ""
    say(f"draining: what came is answered{late}")
    await asyncio.sleep(settings.drain_grace)
    service.refuse()
    http.should_exit = True
    ending: list[Awaitable[object]] = [serving]
    if grpc is not None:
        ending.append(grpc.stop(settings.drain_seconds))
    if agent is not None and loading is not None:
        agent.should_exit = True
        ending.append(loading)
    await asyncio.gather(*ending)
    for task in (sweeping, leasing, renewing, stopping):
        task.cancel()


def _say_where(
    settings: Settings,
    listeners: tuple[socket.socket, socket.socket | None],
    grpc: RpcServer | None,
    say: Callable[[str], None],
) -> None:
    listener, for_agent = listeners
    scheme = "https" if settings.tls_cert is not None else "http"
    say(f"serving on {scheme}://{_shown(settings.host)}:{listener.getsockname()[1]}")
    if grpc is not None:
        say(f"serving gRPC on {_shown(settings.host)}:{grpc.port}")
    if for_agent is not None:
        say(f"serving a model agent on 127.0.0.1:{for_agent.getsockname()[1]}")


async def _renewing(certificates: Certificates | None, http: HttpServer, grpc: RpcServer | None) -> None:
    """Reload the certificate for new connections every few seconds and on SIGHUP."""
    if certificates is None:
        return
    asked = asyncio.Event()
    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), _RENEW_SECONDS)
        asked.clear()
        if await asyncio.to_thread(certificates.renew):
            http.tls = certificates.context
            if grpc is not None:
                grpc.renew(Tls(*certificates.pem))


def rest_application(
    service: Service, settings: Settings, observe: Callable[[RequestContext], None], intake: Intake
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Return the ASGI application of a service."""
    limits = RestLimits(
        elements=settings.max_elements,
        body_bytes=min(settings.max_body_bytes, service.largest_body or settings.max_body_bytes),
        json_bytes=settings.max_json_bytes,
        upload_bytes=settings.max_upload_bytes,
        json_upload_bytes=settings.max_json_upload_bytes,
    )
    answer = application(service, limits, observe, intake)
    shown = Console(answer, intake, observe, keys=not settings.no_auth) if settings.console else answer
    return LocalOnly(shown, answer.refuse) if settings.no_auth else shown


def _http(
    service: Service, settings: Settings, observe: Callable[[RequestContext], None], intake: Intake
) -> HttpServer:
    config = uvicorn.Config(
        rest_application(service, settings, observe, intake),
        ws="none",  # otherwise an installed WebSocket library responds before authentication
        lifespan="off",
        proxy_headers=False,  # client addresses are not used
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    return HttpServer(config, settings.patience)


def rpc_server(
    service: Service,
    settings: Settings,
    observe: Callable[[RequestContext], None],
    intake: Intake,
    certificates: Certificates | None,
) -> RpcServer | None:
    """Return the gRPC server of a service; None if the settings have no port for it."""
    if settings.grpc_port is None:
        return None
    # grpc delivers messages as a whole, which blocks the event loop for 2 ms per MB even if the message is refused.
    useful = max(service.largest_body or settings.max_body_bytes, _GRPC_BYTES)
    limits = RpcLimits(
        elements=settings.max_elements,
        message_bytes=min(settings.max_body_bytes, settings.max_grpc_bytes or useful),
        connections=settings.patience.connections,
        handshake_seconds=settings.head_timeout,
    )
    tls = None if certificates is None else Tls(*certificates.pem)
    servicer = Servicer(service, limits, observe, intake)
    return RpcServer(servicer, limits, host=settings.host, port=settings.grpc_port, tls=tls)


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):

        def asked(number: signal.Signals = number) -> None:
            stop.set()
            for other in (signal.SIGTERM, signal.SIGINT):  # a second signal ends the process at once
                loop.remove_signal_handler(other)
                signal.signal(other, signal.SIG_DFL)

        loop.add_signal_handler(number, asked)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServerError(
            f"listen on {_shown(host)}:{port}",
            problem=error.strerror or str(error),
            fix="Take another --port, or stop what listens there.",
        ) from None
    with listener:
        # Inherited by connections on any event loop: without it a response of two parts takes 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    return uvloop.new_event_loop


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host

"""Server settings, from flags, then the environment (TPEFT_...), then a file, then defaults."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.batching.policy import Limits as Batching
from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits
from tpeft_deploy.runtime.server.rest.transport.seats import Patience, affordable
from tpeft_deploy.runtime.server.tenancy.intake import ByteBudget, Concurrency, Intake, budget_of_bodies
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["Settings", "is_loopback", "read"]

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}
_MIB, _GIB = 2**20, 2**30
# A run of 8 rows of 512 tokens in three inputs is a fifth of the first, and 32 pictures of 3 x 224 x 224 are
# just below 0.6 of the second.
_RUN_TOKENS, _RUN_ELEMENTS = 2**16, 2**23


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError("a duration such as 30s, 500ms or 2m")
    return float(match[1]) * _UNITS[match[2]]


def _numbers(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


_Numbers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Numbers = Annotated[_Numbers | None, NoDecode, BeforeValidator(_numbers)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]


def _bytes(size: int) -> Any:
    return Field(default=ByteSize(size))


class Settings(BaseSettings):
    """All settings; the names are also the keys of the file and, with TPEFT_, the environment variables."""

    model_config = SettingsConfigDict(env_prefix="TPEFT_", extra="forbid", frozen=True)

    state: Path = Path("tpeft-state")
    """State directory: keys, tenants and registered adapters."""
    database_url: str | None = Field(default=None, repr=False)
    """PostgreSQL or SQLite URL (default: SQLite in `state`)."""
    store_url: str | None = Field(default=None, repr=False)
    """URL of an object store for adapters, as fsspec takes it (default: `state`)."""
    cache_bytes: ByteSize = _bytes(10 * _GIB)
    """Disk space in `state` for cached adapters of `store_url`."""
    store_timeout: Seconds = Field(default=10.0, gt=0)
    """Timeout of a call of the object store; a long transfer has as much for each 8 MiB."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """HTTP port (default 8080; 0 picks a free port and prints it)."""
    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    """gRPC port (default: no gRPC)."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of /metrics for scrapers that send no key; for a private network only (default: none)."""
    tls_cert: Path | None = None
    """TLS certificate chain, PEM."""
    tls_key: Path | None = None
    """TLS private key, PEM."""
    no_auth: bool = False
    """Disable authentication; allowed only on a loopback `host`."""
    agent_models: Path | None = None
    """Directory of adapters that a model agent, such as KServe's, loads without a key (default: none)."""
    agent_port: int = Field(default=8080, ge=0, le=65535)
    """Port of the agent, on 127.0.0.1 only."""
    agent_tenant: str = "agent"
    """Tenant that owns what the agent loads."""
    provider: str = Field(default="auto", pattern=r"^(auto|cpu|openvino|(cuda|tensorrt)(:\d{1,3})?)$")
    """ONNX Runtime execution provider: `auto`, `cpu`, `cuda` (`cuda:1` is the second device), `openvino` or
    `tensorrt`."""
    devices: Numbers = None
    """Devices to serve on, such as `0,1`, each with the memory below (default: the one of `provider`)."""
    threads: int | None = Field(default=None, ge=1)
    """Intra-op threads per session (default: one per core)."""
    device_bytes: ByteSize = _bytes(_GIB)
    """Device memory for adapters."""
    host_bytes: ByteSize | None = None
    """Host memory for cached adapters."""
    folded_bytes: ByteSize = _bytes(0)
    """Memory for folded sessions of hot tasks."""
    kv_bytes: ByteSize | None = None
    """Memory for the caches of sequences that are generated (default: 8 sequences, 256 MiB at most)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens of a generated sequence, with its prompt (default: 2,048, or fewer if the model has fewer)."""
    prefix_bytes: ByteSize = _bytes(64 * _MIB)
    """Host memory for caches of known beginnings of prompts."""
    cuda_graphs: bool = False
    """Capture and replay runs as CUDA graphs."""
    allow_tf32: bool = False
    """Compute float32 products in TF32 on CUDA: faster, with errors up to 2e-3."""
    max_rows: int | None = Field(default=None, ge=1)
    """Maximum rows per run (default: 8 on the CPU, where larger runs gain little and delay others; 32 on CUDA)."""
    max_delay: Seconds = 0.002
    """Dynamic batching delay: how long a request waits for others while nothing runs."""
    max_queue_rows: int = Field(default=1024, ge=1)
    """Maximum queued rows; beyond it, the newest request of the tenant with the most queued rows is rejected."""
    large_requests: Literal["split", "refuse"] = "split"
    """Requests of more than `max_rows` rows: split into runs interleaved with others, or refused."""
    max_request_rows: int | None = Field(default=None, ge=1)
    """Maximum rows per request (default: the tenant's share of the queue)."""
    max_run_elements: int | None = Field(default=None, ge=1)
    """Maximum input elements per run, hence also per row (default: 65,536 for integers, else 8,388,608)."""
    max_body_bytes: ByteSize = _bytes(64 * _MIB)
    """Maximum request body size after decompression."""
    max_grpc_bytes: ByteSize | None = Field(default=None, ge=1)
    """Maximum gRPC message size (default: what the model's inputs can fill, at least 4 MiB)."""
    max_upload_bytes: ByteSize = _bytes(512 * _MIB)
    """Maximum size of an uploaded adapter."""
    upload_readers: int = Field(default=2, ge=1)
    """Processes that parse uploads, one upload each at a time."""
    upload_queue: int = Field(default=32, ge=1)
    """Maximum queued uploads; at most a quarter of them from one tenant."""
    upload_cpu_seconds: Seconds = 20.0
    """CPU time limit for parsing one upload."""
    upload_wall_seconds: Seconds = 60.0
    """Wall time limit for parsing one upload, without its time in the queue."""
    upload_memory_bytes: ByteSize = _bytes(2 * _GIB)
    """Address space limit for parsing one upload."""
    max_json_bytes: ByteSize = _bytes(16 * _MIB)
    """Maximum JSON size of a request after decompression, without the raw tensors that follow it."""
    max_json_upload_bytes: ByteSize = _bytes(16 * _MIB)
    """Maximum size of an adapter uploaded as base64 JSON, by the repository's load call."""
    max_inflight_bytes: ByteSize | None = None
    """Maximum memory for in-flight requests and answers (default: 16 times `max_body_bytes`, at least 1 GiB)."""
    max_inflight_bytes_per_tenant: ByteSize | None = None
    """Maximum memory for one tenant's in-flight requests (default: half of `max_inflight_bytes`)."""
    max_staging_bytes: ByteSize | None = None
    """Maximum disk space for unfinished uploads (default: 4 times `max_upload_bytes`)."""
    max_staging_bytes_per_tenant: ByteSize | None = None
    """Maximum disk space for one tenant's unfinished uploads (default: half of `max_staging_bytes`)."""
    max_connections: int | None = Field(default=None, ge=1)
    """Maximum open connections over HTTP, and as many over gRPC (default: as open files allow, at most 1000)."""
    max_connections_per_address: int = Field(default=256, ge=0)
    """Maximum open HTTP connections per client address or IPv6 /64; 0 disables it, as needed behind a proxy."""
    max_requests_per_key: int = Field(default=256, ge=1)
    """Maximum concurrent requests per key."""
    max_streams_per_key: int = Field(default=64, ge=1)
    """Maximum open gRPC streams per key."""
    head_timeout: Seconds = 10.0
    """Timeout for request headers, from the first byte or the start of the connection; also for a TLS handshake."""
    stall_timeout: Seconds = 10.0
    """Timeout for receiving 64 KiB of a body, or for the client to read 64 KiB of an answer."""
    idle_timeout: Seconds = 20.0
    """Keep-alive timeout: how long a connection may wait for its next request."""
    max_elements: int = Field(default=1 << 26, ge=1)
    """Maximum elements per tensor."""
    requests_per_s: float | None = None
    """Default tenant quota: requests per second (default: unlimited, as for the next four)."""
    rows_per_s: float | None = None
    """Default tenant quota: rows per second."""
    tokens_per_min: float | None = None
    """Default tenant quota: tokens of prompts and generated tokens per minute."""
    queue_share: float | None = 0.5
    """Default tenant quota: share of the queue."""
    max_adapters: int | None = None
    """Default tenant quota: registered versions."""
    max_adapter_bytes: ByteSize | None = None
    """Default tenant quota: stored bytes."""
    max_pins: int | None = Field(default=8, ge=0)
    """Default tenant quota: pinned versions; those of all tenants take at most half of the rows on the device."""
    max_folded: int | None = Field(default=2, ge=0)
    """Default tenant quota: pinned versions with a folded session."""
    max_folded_in_all: int = Field(default=8, ge=0)
    """Maximum pinned versions with a folded session, over all tenants."""
    drain_seconds: Seconds = 30.0
    """Shutdown timeout: how long in-flight requests may take to finish."""
    drain_grace: Seconds = 0.0
    """How long the server keeps serving, not ready, before shutdown, so that load balancers notice."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Log level on stderr."""
    access_log: bool = True
    """Write a JSON line per request to stderr."""
    console: bool = True
    """Serve the console under /console/; its files need no key."""
    metrics_for_all_keys: bool = False
    """Let keys without the admin role read /metrics, which name all tenants and tasks."""
    max_task_series: int = Field(default=1000, ge=1)
    """Maximum tasks with separate metrics; the others share one series."""
    changes_per_s: float = Field(default=10.0, ge=0)
    """Uploads, alias changes, pins and other changes per second and key, in bursts of ten seconds; 0: unlimited."""
    audit_days: float = Field(default=365.0, ge=0)
    """Days to keep audit log entries; 0: forever."""
    audit_rows: int = Field(default=1_000_000, ge=0)
    """Number of audit log entries to keep; 0: all."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags, then the environment, then the file; nothing else."""
        found: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if settings_cls.model_config.get("toml_file"):
            found.append(TomlConfigSettingsSource(settings_cls))
        return tuple(found)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are set together")
        if self.no_auth and not is_loopback(self.host):
            raise ValueError(f"no_auth is for a loopback address only, and host is {self.host}")
        if self.agent_models is not None and self.agent_port and self.agent_port == self.port:
            raise ValueError(f"port and agent_port differ, and both are {self.port}")
        return self

    @property
    def quota(self) -> Quota:
        """Default quota of tenants."""
        return Quota(
            self.requests_per_s,
            self.rows_per_s,
            self.queue_share,
            self.max_adapters,
            self.max_adapter_bytes,
            pins=self.max_pins,
            folded=self.max_folded,
            tokens_per_min=self.tokens_per_min,
        )

    @property
    def reading(self) -> ParsingLimits:
        """Limits of the processes that parse uploads."""
        return ParsingLimits(
            readers=self.upload_readers,
            waiting=self.upload_queue,
            tenant_waiting=math.ceil(self.upload_queue / 4),
            cpu_seconds=max(1, math.ceil(self.upload_cpu_seconds)),
            wall_seconds=self.upload_wall_seconds,
            memory_bytes=self.upload_memory_bytes,
            result_bytes=2 * self.max_upload_bytes,  # float16 becomes float32
        )

    @property
    def intake(self) -> Intake:
        """Memory and disk budgets, and request limits per key."""
        memory = budget_of_bodies(self.max_body_bytes, self.max_inflight_bytes, self.max_inflight_bytes_per_tenant)
        staging = self.max_staging_bytes or 4 * self.max_upload_bytes
        return Intake(
            memory,
            ByteBudget(staging, self.max_staging_bytes_per_tenant, "bytes of unfinished uploads"),
            requests=Concurrency(self.max_requests_per_key),
            streams=Concurrency(self.max_streams_per_key, "streams"),
        )

    @property
    def patience(self) -> Patience:
        """Limits and timeouts of HTTP connections."""
        return Patience(
            connections=self.max_connections or affordable(1 if self.grpc_port is None else 2),
            per_address=self.max_connections_per_address,
            head_seconds=self.head_timeout,
            stall_seconds=self.stall_timeout,
            idle_seconds=self.idle_timeout,
        )

    @property
    def store_options(self) -> dict[str, Any]:
        """Arguments of `open_state` for the store of the adapters."""
        return {"store": self.store_url, "cache_bytes": self.cache_bytes, "store_timeout": self.store_timeout}

    @property
    def runtime_options(self) -> dict[str, Any]:
        """Arguments of the server's `Runtime`."""
        return {
            "provider": self.provider,
            "devices": self.devices,
            "threads": self.threads,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "folded_bytes": self.folded_bytes,
            "kv_bytes": self.kv_bytes,
            "max_tokens": self.max_tokens,
            "prefix_bytes": self.prefix_bytes,
            "cuda_graphs": self.cuda_graphs,
            "allow_tf32": self.allow_tf32,
            "pinned_share": 0.5,
        }

    def limits(self, bundle: Bundle, device: str) -> Batching:
        """Return the batching limits for a bundle on a device, as `Choice.device`."""
        ports = [port for part in bundle.components.values() for port in part.manifest.inputs]
        return self.batching(device, tokens=all(np.issubdtype(port.dtype, np.integer) for port in ports))

    def batching(self, device: str, *, tokens: bool = False) -> Batching:
        """Return the batching limits for a device.

        Args:
            device: as `Choice.device`.
            tokens: whether all inputs of the model are integers.
        """
        rows = self.max_rows or (32 if device != "cpu" else 8)
        most = rows if self.large_requests == "refuse" else self.max_request_rows or self.max_queue_rows
        return Batching(
            max_rows=rows,
            max_delay=self.max_delay,
            max_queue_rows=self.max_queue_rows,
            max_request_rows=min(most, self.max_queue_rows),
            max_run_elements=self.max_run_elements or (_RUN_TOKENS if tokens else _RUN_ELEMENTS),
        )


def read(file: Path | None, flags: Mapping[str, object]) -> Settings:
    """Read and validate the settings.

    Args:
        file: path of a TOML file, or None.
        flags: values of the flags that were given.

    Raises:
        ServerError: an unknown or invalid setting; the message names it, without its value.
    """
    kind = Settings
    if file is not None:
        if not file.is_file():
            raise ServerError(f"read settings from {file}", expected="a TOML file", got="none")

        class WithFile(Settings):
            model_config = SettingsConfigDict(toml_file=file)

        kind = WithFile
    try:
        return kind(**flags)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        where = f" from {file}, the environment and flags" if file is not None else ""
        doing = f"read settings{where}" + (f", {name!r}" if name else "")
        raise ServerError(doing, problem=first["msg"].removeprefix("Value error, ")) from None
    except ValueError as error:  # malformed TOML
        raise ServerError(f"read settings from {file}", problem=str(error).splitlines()[0]) from None


def is_loopback(host: str) -> bool:
    """Whether an address is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""What can be set: by flags, by the environment (TPEFT_...), by a file; each before the next."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.batching.policy import Limits as Batching
from tpeft_deploy.runtime.server.isolation.limits import Limits as Reading
from tpeft_deploy.runtime.server.rest.transport.seats import Patience, affordable
from tpeft_deploy.runtime.server.tenancy.byte_budget import ByteBudget, budget_of_bodies
from tpeft_deploy.runtime.server.tenancy.concurrency import Concurrency
from tpeft_deploy.runtime.server.tenancy.intake import Intake
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


Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]


def _bytes(size: int) -> Any:
    return Field(default=ByteSize(size))


class Settings(BaseSettings):
    """Everything that can be set; names are those of the file's keys, of flags, and of TPEFT_ variables."""

    model_config = SettingsConfigDict(env_prefix="TPEFT_", extra="forbid", frozen=True)

    state: Path = Path("tpeft-state")
    """Directory of keys, tenants and registered adapters."""
    database_url: str | None = Field(default=None, repr=False)
    """URL of PostgreSQL or SQLite; SQLite in `state` by default."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Of HTTP; 0 takes a free one and prints it."""
    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    """Of gRPC; no gRPC by default."""
    tls_cert: Path | None = None
    """Certificate chain, PEM."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    no_auth: bool = False
    """Ask for no keys; only where `host` is a loopback address."""
    provider: Literal["auto", "cuda", "cpu"] = "auto"
    """Execution provider."""
    threads: int | None = Field(default=None, ge=1)
    """Of each session; one per core by default."""
    device_bytes: ByteSize = _bytes(_GIB)
    """What adapters may take on the device."""
    host_bytes: ByteSize | None = None
    """What copies of adapters may take in host memory."""
    folded_bytes: ByteSize = _bytes(0)
    """What sessions of hot tasks may take."""
    cuda_graphs: bool = False
    """Record runs as CUDA graphs."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows of one run; 8 on the CPU, where more gains little and delays others, and 32 on CUDA by default."""
    max_delay: Seconds = 0.002
    """How long a request may wait for company while nothing runs."""
    max_queue_rows: int = Field(default=1024, ge=1)
    """Rows that may wait; of more, the tenant with the most waiting loses its newest request."""
    large_requests: Literal["split", "refuse"] = "split"
    """What happens to requests of more than `max_rows` rows: cut into runs that others alternate with, or refused."""
    max_request_rows: int | None = Field(default=None, ge=1)
    """Rows of one request; as many as may wait of its tenant by default."""
    max_run_elements: int | None = Field(default=None, ge=1)
    """Elements of the inputs of one run, and so of one row; 65,536 of integers, 8,388,608 of others by default."""
    max_body_bytes: ByteSize = _bytes(64 * _MIB)
    """Of a request, after decompression."""
    max_grpc_bytes: ByteSize | None = Field(default=None, ge=1)
    """Of a message over gRPC, received at once; what fills the model's inputs, 4 MiB at least, by default."""
    max_upload_bytes: ByteSize = _bytes(512 * _MIB)
    """Of an uploaded adapter."""
    upload_readers: int = Field(default=2, ge=1)
    """Processes that read uploads, one upload each at a time."""
    upload_queue: int = Field(default=32, ge=1)
    """Uploads that may wait for such a process; a quarter of them of one tenant."""
    upload_cpu_seconds: Seconds = 20.0
    """Processor time for reading one upload."""
    upload_wall_seconds: Seconds = 60.0
    """Time for reading one upload once a process begins on it."""
    upload_memory_bytes: ByteSize = _bytes(2 * _GIB)
    """Address space for reading one upload."""
    max_json_bytes: ByteSize = _bytes(16 * _MIB)
    """Of a request's JSON, after decompression; raw tensors behind it are not counted."""
    max_json_upload_bytes: ByteSize = _bytes(16 * _MIB)
    """Of an adapter uploaded as base64 in JSON, by the repository's load call."""
    max_inflight_bytes: ByteSize | None = None
    """Bodies, tensors and answers that are in memory at once; 16 times max_body_bytes, 1 GiB at least, by default."""
    max_inflight_bytes_per_tenant: ByteSize | None = None
    """What a tenant may have of them; half by default."""
    max_staging_bytes: ByteSize | None = None
    """Unfinished uploads on disk; 4 times max_upload_bytes by default."""
    max_staging_bytes_per_tenant: ByteSize | None = None
    """What a tenant may have of them; half by default."""
    max_connections: int | None = Field(default=None, ge=1)
    """Open connections over HTTP, and as many over gRPC; what open files allow, at most 1000, by default."""
    max_connections_per_address: int = Field(default=256, ge=0)
    """Open connections over HTTP of one client address; 0 is no limit, as it has to be behind a proxy."""
    max_requests_per_key: int = Field(default=256, ge=1)
    """Requests of one key that are not answered yet."""
    max_streams_per_key: int = Field(default=64, ge=1)
    """Open streams over gRPC of one key."""
    head_timeout: Seconds = 10.0
    """How long the head of a request may take, from its first byte or the connection's start; also a TLS handshake."""
    stall_timeout: Seconds = 10.0
    """How long 64 KiB of a body may take to come, or 64 KiB of an answer to be read."""
    idle_timeout: Seconds = 20.0
    """How long a connection may wait for its next request."""
    max_elements: int = Field(default=1 << 26, ge=1)
    """Of a tensor."""
    requests_per_s: float | None = None
    """Default quota of a tenant; none by default, as for the next three."""
    rows_per_s: float | None = None
    """Default quota of a tenant."""
    queue_share: float | None = 0.5
    """Share of the queue that a tenant may take."""
    max_adapters: int | None = None
    """Default quota of registered versions."""
    max_adapter_bytes: ByteSize | None = None
    """Default quota of bytes stored."""
    max_pins: int | None = Field(default=8, ge=0)
    """Default quota of pinned versions; those of all tenants take at most half of the rows on the device."""
    max_folded: int | None = Field(default=2, ge=0)
    """Default quota of pinned versions with sessions of their own."""
    max_folded_in_all: int = Field(default=8, ge=0)
    """Pinned versions with sessions of their own, of all tenants together."""
    drain_seconds: Seconds = 30.0
    """How long requests may take to finish once the server is told to stop."""
    drain_grace: Seconds = 0.0
    """How long the server goes on answering, no longer ready, once it is told to stop: load balancers notice."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the log on stderr."""
    access_log: bool = True
    """A line of JSON on stderr for each request."""
    metrics_for_all_keys: bool = False
    """Whether keys without the role admin may read /metrics, which name all tenants and tasks."""
    max_task_series: int = Field(default=1000, ge=1)
    """Tasks with metrics of their own; others are counted together."""
    changes_per_s: float = Field(default=10.0, ge=0)
    """Uploads, swaps, pins and other changes a second with one key; ten seconds' worth may come at once, 0: any."""
    audit_days: float = Field(default=365.0, ge=0)
    """Days for which entries of the audit log stay; 0: for ever."""
    audit_rows: int = Field(default=1_000_000, ge=0)
    """Entries of the audit log that stay, the newest; 0: all."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file; nothing else is read."""
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
        return self

    @property
    def quota(self) -> Quota:
        """Of tenants that have none of their own."""
        return Quota(
            self.requests_per_s,
            self.rows_per_s,
            self.queue_share,
            self.max_adapters,
            self.max_adapter_bytes,
            pins=self.max_pins,
            folded=self.max_folded,
        )

    @property
    def reading(self) -> Reading:
        """Limits of reading uploads."""
        return Reading(
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
        """Budgets and threads of a server."""
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
        """Limits of connections over HTTP."""
        return Patience(
            connections=self.max_connections or affordable(1 if self.grpc_port is None else 2),
            per_address=self.max_connections_per_address,
            head_seconds=self.head_timeout,
            stall_seconds=self.stall_timeout,
            idle_seconds=self.idle_timeout,
        )

    def batching(self, device: str, *, tokens: bool = False) -> Batching:
        """Limits of batching on a device.

        Args:
            device: "cpu" or "cuda".
            tokens: whether all inputs of the model are integers.
        """
        rows = self.max_rows or (32 if device == "cuda" else 8)
        most = rows if self.large_requests == "refuse" else self.max_request_rows or self.max_queue_rows
        return Batching(
            max_rows=rows,
            max_delay=self.max_delay,
            max_queue_rows=self.max_queue_rows,
            max_request_rows=min(most, self.max_queue_rows),
            max_run_elements=self.max_run_elements or (_RUN_TOKENS if tokens else _RUN_ELEMENTS),
        )


def read(file: Path | None, flags: Mapping[str, object]) -> Settings:
    """The settings of a run.

    Args:
        file: TOML, or None.
        flags: those that were given.

    Raises:
        ServerError: something unknown, or of the wrong kind; one line that names it, without its value.
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
    except ValueError as error:  # TOML that is none
        raise ServerError(f"read settings from {file}", problem=str(error).splitlines()[0]) from None


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

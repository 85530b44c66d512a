"""Settings of a cluster: those of a server, and the numbers of replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.server.settings import Settings

__all__ = ["ClusterSettings"]

SECRETS = ("database_url", "store_url")  # may hold a password: from the environment of the machines


@dataclass(frozen=True)
class ClusterSettings:
    """What a cluster serves, and on how much.

    Attributes:
        bundle: directory of the bundle, the same on every machine.
        server: settings of a server by name, as in its file.
        replicas: number of replicas, or the least if `max_replicas` is more.
        max_replicas: number of replicas that waiting rows may lead to; None for no more.
        ingresses: number of processes that answer clients; one, as the directory of the registry has one user.
        cpus: CPU cores that a replica takes.
        gpus: GPUs that a replica takes.
        rows_per_replica: waiting and running rows of a replica, above which one more is started.

    Raises:
        ServerError: a number does not fit, or there is no such setting.
    """

    bundle: str
    server: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 2
    max_replicas: int | None = None
    ingresses: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    rows_per_replica: float = 32.0

    def __post_init__(self) -> None:
        doing = "configure a cluster"
        if self.replicas < 1 or self.ingresses < 1:
            raise ServerError(doing, expected="at least one replica and one ingress", got="fewer")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ServerError(doing, expected=f"max_replicas of at least {self.replicas}", got=self.max_replicas)
        if self.ingresses > 1:  # each would need a registry that servers share, with the adapters in a store
            raise ServerError(doing, expected="one ingress", got=self.ingresses, fix="Take more replicas instead.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Read the arguments of an application.

        Raises:
            ServerError: there is no such argument.
        """
        known = {own.name for own in fields(cls)}
        if "bundle" not in arguments or not {*arguments} <= known:
            raise ServerError(
                "configure a cluster",
                expected=f"'bundle', and arguments among {', '.join(sorted(known))}",
                got=", ".join(sorted(map(str, arguments))) or "none",
            )
        return cls(**arguments)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of an application that are not defaults, without secrets."""
        own = asdict(self)
        own["server"] = {name: value for name, value in self.server.items() if name not in SECRETS}
        default = ClusterSettings("")
        return {name: value for name, value in own.items() if value != getattr(default, name)}

    @property
    def settings(self) -> Settings:
        """Settings of a server, with those of the environment.

        Raises:
            ServerError: there is no such setting, or a value does not fit.
        """
        try:
            return Settings(**self.server)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            raise ServerError("configure a cluster", problem=f"{where}: {first['msg']}") from None

    @property
    def path(self) -> Path:
        """Directory of the bundle."""
        return Path(self.bundle).resolve()

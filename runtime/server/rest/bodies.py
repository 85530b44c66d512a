"""JSON bodies of requests other than inference; decoding and the OpenAPI document are derived from them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

__all__ = ["Alias", "Body", "Expected", "Index", "Key", "Parameters", "Pin", "QuotaBody"]

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # range of an SQL integer
VersionNumber = str | Int
Number = Int | float
Positive = Annotated[int, msgspec.Meta(gt=0, le=2**63 - 1)] | Annotated[float, msgspec.Meta(gt=0)]
Limit = Int | float | None | UnsetType


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object without other fields than those of its class.

    Attributes:
        unlisted: fields that errors and the OpenAPI document leave out, as they are always refused.
    """

    unlisted: ClassVar[tuple[str, ...]] = ()


class Index(Body):
    """Filter of the repository index."""

    ready: bool = False


class Parameters(Body):
    """Parameters of the repository's load and unload calls."""

    parameters: dict[str, Any] | UnsetType = UNSET


class Expected(Body):
    """Precondition of a rollback: the alias's current version."""

    expected: VersionNumber | UnsetType = UNSET


class Alias(Expected, kw_only=True):
    """Version of an alias, and the version that it replaces."""

    version: VersionNumber


class Pin(Body):
    """Way of pinning a task."""

    folded: bool = False


class Key(Body):
    """A new key."""

    tenant: str
    role: Literal["infer", "deploy", "admin"]
    expires_in: Number | UnsetType = UNSET


class QuotaBody(Body):
    """Quotas and weight of a tenant; null is unlimited."""

    requests_per_s: Limit = UNSET
    rows_per_s: Limit = UNSET
    queue_share: Limit = UNSET
    adapters: Limit = UNSET
    bytes: Limit = UNSET
    pins: Limit = UNSET
    folded: Limit = UNSET
    weight: Positive | UnsetType = UNSET

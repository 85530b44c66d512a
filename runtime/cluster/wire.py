"""Messages between an ingress and the replicas."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.generation.sampling import Sampling, Token
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.tucker import Array

__all__ = [
    "Computed",
    "Figures",
    "GenerateCall",
    "InferCall",
    "SequenceStep",
    "joined",
    "Refused",
    "CallRoute",
    "TaskRef",
    "digest_of",
    "local_name",
]

TaskRef = str | Mapping[str, float]
"""Name of an adapter on every replica, or a weighted set of them."""


def local_name(digest: str) -> str:
    """Return the name of a registered adapter on every replica: by content, so that it never stands for another."""
    return f"/{digest}@1"


def digest_of(name: str) -> str | None:
    """Return the digest in a name that `local_name` made; None for a task of the bundle."""
    return name[1:-2] if name.startswith("/") else None


@dataclass(frozen=True)
class CallRoute:
    """What the router has to know of a call.

    Attributes:
        digest: digest of the adapter; empty for the base.
        rows: number of rows.
        replica: name of the replica that was chosen already.
        avoid: name of a replica that was lost.
    """

    digest: str = BASE_TASK
    rows: int = 1
    replica: str | None = None
    avoid: str | None = None


@dataclass(frozen=True)
class InferCall:
    """A request for `Runtime.infer`; its fields are the arguments there.

    Attributes:
        quota: current quota of the tenant, for the order of the queue.
    """

    inputs: Mapping[str, Array]
    tasks: Sequence[str] | None
    task: TaskRef | None
    outputs: Sequence[str] | None
    timeout: float | None
    tenant: str
    priority: int
    quota: Quota
    component: str | None


@dataclass(frozen=True)
class Computed:
    """Result of an inference.

    Attributes:
        outputs: outputs as `Runtime.infer` returns them.
        ran: seconds of the run.
        since: seconds from the end of the run to the end of the call.
        rows: rows of the run.
    """

    outputs: Mapping[str, Array | list[Array]]
    ran: float
    since: float
    rows: int


@dataclass(frozen=True)
class Refused:
    """An error of a call, as a value: the cluster logs exceptions as faults of the program."""

    error: TpeftError


@dataclass(frozen=True)
class GenerateCall:
    """A request for `Runtime.start`, without what cannot leave its process.

    Attributes:
        before: tokens that the text continues; None for tokens without text.
        shown: special tokens that the text has.
        schema: JSON schema of the text.
        left: seconds after which the result is of no use.
        quota: current quota of the tenant.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    task: TaskRef | None
    tenant: str
    public: bool
    priority: int
    left: float
    scored: bool
    before: Sequence[int] | None
    shown: Sequence[str]
    schema: Mapping[str, Any] | None
    inputs: Mapping[str, object] | None
    quota: Quota

    @property
    def deadline(self) -> float:
        """Deadline by this process's clock."""
        return self.left if self.left == math.inf else time.monotonic() + self.left


@dataclass(frozen=True)
class SequenceStep:
    """What happened to one of the sequences of a call.

    Attributes:
        choice: number of the sequence; -1 when all have begun.
        tokens: new tokens.
        reason: why it ended; None while it runs.
        error: error that ended it.
    """

    choice: int
    tokens: Sequence[Token] = ()
    reason: str | None = None
    error: TpeftError | None = None


def joined(steps: Iterable[SequenceStep]) -> list[SequenceStep]:
    """Join the steps of each sequence, of which only the last may end it; sequences in the order of their first."""
    found: dict[int, SequenceStep] = {}
    for step in steps:
        before = found.get(step.choice)
        found[step.choice] = step if before is None else replace(step, tokens=(*before.tokens, *step.tokens))
    return list(found.values())


@dataclass(frozen=True)
class Figures:
    """State of a replica, as its router reads it every second.

    Attributes:
        rows: rows that wait or run.
        resident: 8 bytes of each adapter on the device, the first of its digest; those used last, if there are many.
        usage: as `Runtime.usage`.
        batching: as `Runtime.batching`.
        generation: as `Runtime.generation`.
        facts: `provider`, `provider_reason` and `most_tokens` of the runtime.
    """

    rows: int = 0
    resident: frozenset[bytes] = frozenset()
    usage: Mapping[str, int] = field(default_factory=dict)
    batching: Any = None
    generation: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)

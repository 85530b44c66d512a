"""What a benchmark found, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Benchmark", "CaseCost", "ColdLoad", "GenerationCost", "LeftOut", "Memory", "Spread", "Switching"]


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class CaseCost:
    """One way of running a batch.

    Args:
        case: its name, one of `cases.CASES`.
        rows: rows of the batch.
        ms: milliseconds of a batch.
        ratio: to the plain run of the same round.
        repeats: rounds.
        component: component of the graph; empty for the only one.
    """

    case: str
    rows: int
    ms: Spread
    ratio: Spread
    repeats: int
    component: str = ""


@dataclass(frozen=True)
class GenerationCost:
    """Rows that are generated together.

    Args:
        case: name, one of `generating.GENERATED`.
        rows: sequences.
        tokens_per_s: new tokens of all rows in a second, prompts and encoders included.
        repeats: rounds.
    """

    case: str
    rows: int
    tokens_per_s: Spread
    repeats: int


@dataclass(frozen=True)
class Switching:
    """Another task every run against the same task again, with a number of adapters known.

    Args:
        adapters: that the runtime knows.
        repeated_ms: milliseconds of a run of the task that ran before.
        switched_ms: milliseconds of a run of another task than the one before.
        microseconds: difference between the switched and the repeated run of the same round.
        ratio: ratio of the two.
    """

    adapters: int
    repeated_ms: Spread
    switched_ms: Spread
    microseconds: Spread
    ratio: Spread


@dataclass(frozen=True)
class ColdLoad:
    """An adapter of the bundle that comes from disk, its digests checked.

    Args:
        task: task of the adapter.
        bytes: size of its file.
        load_ms: until `Runtime.load` returns.
        first_run_ms: milliseconds of the first run after that; what it takes above a banked run is part of the load.
        repeats: how often.
    """

    task: str
    bytes: int
    load_ms: Spread
    first_run_ms: Spread
    repeats: int


@dataclass(frozen=True)
class Memory:
    """What the process held at one moment; None where the system does not say."""

    at: str
    bytes: int | None


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """All figures of one bundle on one provider.

    Args:
        bundle: its name.
        digest: digest of its manifest.
        provider: "cuda" or "cpu".
        provider_reason: why that one.
        threads: intra-op threads, None for one per core.
        onnxruntime: its version.
        tasks: that took turns.
        cases: per number of rows and case.
        switching: per number of adapters.
        cold: None where the bundle has no task.
        memory: memory of the process, in the order of time.
        usage: bytes that the runtime reports for its adapters, with all of `switching` loaded.
        left_out: parts that were not measured.
        generation: per number of rows and case, where the bundle generates.
    """

    bundle: str
    digest: str
    provider: str
    provider_reason: str
    threads: int | None
    onnxruntime: str
    tasks: Sequence[str]
    cases: Sequence[CaseCost]
    switching: Sequence[Switching]
    cold: ColdLoad | None
    memory: Sequence[Memory]
    usage: Mapping[str, int]
    left_out: Sequence[LeftOut]
    generation: Sequence[GenerationCost] = ()

    def to_json(self) -> dict[str, Any]:
        """The document that --json prints."""
        return asdict(self)

"""What a bundle says about itself: `manifest.json`, parsed strictly.

schema      version of this file's layout
name        the bundle's name
base        digest of all weights, and per weight its shape, dtype, digest and place in weights.data
targets     the weights that adapters may change, with their layer kind (see `slots`)
rows        "each": one run serves rows of different adapters; "group": one adapter per run, and why
rows_reasons    per weight that takes one adapter per run, why
inputs, outputs, files, max_rank, gate
oracles     per task of the export, what its forms were compared with beside the merged base: a training library's own
            forward of the adapter's file ("peft 0.21.2"), or "merged" and why there was none; the worst error; and the
            digest of the adapter that this is about
empty       free sizes that may be 0, proved: the past of a decoder's first step
tolerance   relative error in float32 that the caller of the export accepted, where it is more than the limit of 1e-5
left_out    per task of the export, what its adapter's file holds and the task does not, and why
rounding    of a base in 16 bits: how far its forward is from the same in 32 bits, and the limits that follow
digest      SHA-256 of everything above
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from tpeft_deploy.bundle.packing import Packed, packed_of
from tpeft_deploy.bundle.slots import Kind, Target
from tpeft_deploy.bundle.tolerances import WIDEST_TOLERANCE
from tpeft_deploy.errors import BundleError, IntegrityError, VersionError

__all__ = [
    "SCHEMA",
    "FileRecord",
    "Manifest",
    "OutputRows",
    "Port",
    "Rounding",
    "Rows",
    "Varies",
    "Weight",
    "base_digest",
    "check_name",
    "is_name",
]

SCHEMA = 1
Rows = Literal["each", "group"]
OutputRows = Literal["each", "shared", "joint"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_FREE = re.compile(r"[A-Za-z_]\w*")  # a name in a size, which may be a sum: past + sequence


def is_name(name: str) -> bool:
    """Whether a bundle or a task may have the name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """The name itself, if it may name a bundle or a task.

    Raises:
        BundleError: it is not `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}`.
    """
    if not is_name(name):
        raise BundleError(
            f"name a {what}",
            expected="1 to 128 letters, digits, '.', '_', ':' or '-', starting with a letter or digit",
            got=repr(name),
        )
    return name


@dataclass(frozen=True)
class Varies:
    """An axis of an output that has a size C of a task's own: the first of its override (the classes of its head).

    Args:
        axis: has `times` C + `plus` entries, of which a narrower head's come first.
        override: the weight that has C rows.
        times: entries for each row.
        plus: entries before those of the first row.
    """

    axis: int
    override: str
    times: int = 1
    plus: int = 0


@dataclass(frozen=True)
class Port:
    """An input or output of the model; a size that is a string is free, and equal wherever it has the same name.

    Args:
        name: of the input or output.
        dtype: as numpy names it.
        shape: the sizes of its axes.
        varies: for an output with an axis of a task's own size.
        pad: for an input, what a free axis other than the batch may be filled up with at its end, or None: rows of
            other lengths cannot share a run.
        rows: for an output, "each": entry r of its first axis depends on row r alone; "shared": no batch axis, and the
            same whatever the rows and the adapter; "joint": it depends on several rows, or on the adapter without
            having rows, so that a batch of several tasks or callers has none.  None in bundles that do not say.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    varies: Varies | None = None
    pad: int | float | None = None
    rows: OutputRows | None = None


@dataclass(frozen=True)
class Weight:
    """A base weight and where its bytes are in weights.data (little-endian, row-major)."""

    shape: tuple[int, ...]
    dtype: str
    digest: str
    offset: int
    length: int


@dataclass(frozen=True)
class FileRecord:
    """Digest and size of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Rounding:
    """Distance between a 16-bit base and the same base computed in 32 bits, and what its exports are held to.

    Args:
        dtype: float16 or bfloat16.
        measured: output name -> relative error of the worst row; empty where it could not be measured.
        limits: output name -> relative error that an export in 16 bits must stay under.
        reason: cause of a missing measurement; the limits are then the fixed ones.
    """

    dtype: str
    measured: Mapping[str, float]
    limits: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Manifest:
    """The manifest; `to_json` and `from_json` are exact inverses.

    Args:
        aliases: further name of a weight -> the name it is stored under.
        ties: for each tensor that several modules of the model share, one name per module; a name that is neither a
            weight nor an alias is not read by the forward pass.
        tolerance: relative error that is accepted of weights in float32, or None for the limit of 1e-5.
        left_out: task -> name -> why, as `Adapter.left_out`.
        packing: inputs of banked.cuda.onnx that stand in the place of others of banked.onnx.
    """

    name: str
    producer: str
    weights: Mapping[str, Weight]
    aliases: Mapping[str, str]
    targets: tuple[Target, ...]
    rows: Rows
    rows_reason: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    files: Mapping[str, FileRecord]
    max_rank: int | None = None
    gate: tuple[Mapping[str, Any], ...] = field(default=())
    ties: tuple[tuple[str, ...], ...] = ()
    oracles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    rounding: Rounding | None = None
    tolerance: float | None = None
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rows_reasons: Mapping[str, str] = field(default_factory=dict)
    packing: tuple[Packed, ...] = ()

    @property
    def base_digest(self) -> str:
        """SHA-256 over the names and digests of all base weights."""
        return base_digest({name: weight.digest for name, weight in self.weights.items()})

    @cached_property
    def batch_axis(self) -> str | None:
        """Name of the free size that stands for the batch: the first axis of the first input that has one."""
        firsts = [port.shape[0] for port in self.inputs if port.shape]
        return next((size for size in firsts if isinstance(size, str)), None)

    def batch_axes(self, port: Port) -> list[int]:
        """The axes of a port along which its size depends on the batch, "2*batch" included."""
        batch = self.batch_axis
        return [axis for axis, size in enumerate(port.shape) if batch is not None and batch in _FREE.findall(str(size))]

    @cached_property
    def paddable(self) -> frozenset[str]:
        """Names of the free sizes along which rows of other lengths may be filled up to one, never the batch.

        Every input that has such a size says with what (`Port.pad`), and has it as it is: the end of `past + sequence`
        is not that of `past`.  An output is cut back along those of its sizes that are among the names.
        """
        found, others = set[str](), {self.batch_axis}
        for port in self.inputs:
            for size in port.shape:
                if not isinstance(size, str):
                    continue
                if port.pad is not None and _FREE.fullmatch(size):
                    found.add(size)
                else:
                    others |= {size, *_FREE.findall(size)}
        return frozenset(found - others)

    def canonical(self, name: str) -> str:
        """The name under which a weight is stored; a module that is registered twice has several names."""
        return self.aliases.get(name, name)

    @cached_property
    def stored(self) -> Mapping[str, str]:
        """Every name of a weight that the graphs hold -> the name it is stored under."""
        return {name: name for name in self.weights} | dict(self.aliases)

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """The aliases that are further names of one module: a change under either name is the same change."""
        tied = {name for group in self.ties for name in group}
        return {alias: name for alias, name in self.aliases.items() if alias not in tied}

    def uses(self, name: str) -> list[str]:
        """Names of all modules that a stored weight serves; several where it was exported tied."""
        found = [other for group in self.ties for other in group if self.stored.get(other) == name]
        return found or [name]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all base weights, equal ones counted once as they are stored."""
        return sum(length for _, length in {(weight.offset, weight.length) for weight in self.weights.values()})

    def to_json(self) -> str:
        """The file's text."""
        document = asdict(self)
        document["base"] = {"digest": self.base_digest, "weights": document.pop("weights")}
        document["schema"] = SCHEMA
        document["digest"] = _digest(document)
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Manifest:
        """Parse the file's text.

        Raises:
            VersionError: another schema.
            IntegrityError: damaged, edited, or with a file name that leaves the bundle.
        """
        try:
            document = json.loads(text)
            schema = document["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"read {source}", expected="a bundle's manifest", got=f"text that is not one ({error!r})"
            ) from error
        if schema != SCHEMA:
            raise VersionError(
                f"read {source}",
                expected=f"schema {SCHEMA}",
                got=schema,
                fix="Use the version of tpeft-deploy that wrote it, or export again.",
            )
        try:
            manifest = _parse(cls, document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"read {source}", problem=f"a field is missing or malformed ({error!r})") from error
        _check_digests(document, manifest, source)
        return manifest


def base_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over the sorted "name digest" lines of a base's weights."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _digest(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_digests(document: Mapping[str, Any], manifest: Manifest, source: str) -> None:
    checks = {
        "its own digest": (_digest(document), document.get("digest")),
        "the base digest": (manifest.base_digest, document["base"].get("digest")),
    }
    for what, (expected, got) in checks.items():
        if expected != got:
            raise IntegrityError(
                f"read {source}, {what}",
                expected=f"{expected[:12]}...",
                got=f"{str(got)[:12]}...",
                fix="The manifest was edited or damaged: export the bundle again.",
            )
    for name in manifest.files:
        if "/" in name or "\\" in name or name.startswith(".") or not name:
            raise IntegrityError(f"read {source}, file {name!r}", expected="a plain name inside the bundle", got=name)


def _parse(cls: type[Manifest], document: Mapping[str, Any]) -> Manifest:
    weights = {
        name: Weight(tuple(w["shape"]), w["dtype"], w["digest"], int(w["offset"]), int(w["length"]))
        for name, w in document["base"]["weights"].items()
    }
    if document["rows"] not in get_args(Rows):
        raise ValueError(f"rows {document['rows']!r}")
    return cls(
        name=document["name"],
        producer=document["producer"],
        weights=weights,
        aliases=dict(document["aliases"]),
        targets=tuple(_target(t) for t in document["targets"]),
        rows=document["rows"],
        rows_reason=str(document["rows_reason"]),
        inputs=tuple(_port(p) for p in document["inputs"]),
        outputs=tuple(_port(p) for p in document["outputs"]),
        files={n: FileRecord(f["sha256"], int(f["bytes"])) for n, f in document["files"].items()},
        max_rank=document["max_rank"],
        gate=tuple(document["gate"]),
        ties=_ties(document),
        oracles={task: dict(record) for task, record in document.get("oracles", {}).items()},
        empty=tuple(document.get("empty", ())),
        rounding=_rounding(document.get("rounding")),
        tolerance=_tolerance(document.get("tolerance")),
        left_out={task: dict(names) for task, names in document.get("left_out", {}).items()},
        rows_reasons={str(name): str(why) for name, why in document.get("rows_reasons", {}).items()},
        packing=tuple(packed_of(entry) for entry in document.get("packing", ())),
    )


def _ties(document: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The tied names; of a bundle from before they were written, every alias may be one."""
    if "ties" in document:
        return tuple(tuple(map(str, group)) for group in document["ties"])
    groups: dict[str, list[str]] = {}
    for alias, name in sorted(dict(document["aliases"]).items()):
        groups.setdefault(name, [name]).append(alias)
    return tuple(map(tuple, groups.values()))


def _rounding(entry: Mapping[str, Any] | None) -> Rounding | None:
    if entry is None:
        return None
    measured, limits = ({str(n): float(e) for n, e in entry[part].items()} for part in ("measured", "limits"))
    return Rounding(str(entry["dtype"]), measured, limits, str(entry["reason"]))


def _tolerance(entry: float | None) -> float | None:
    if entry is not None and not 0 < entry <= WIDEST_TOLERANCE:
        raise ValueError(f"tolerance {entry!r}")
    return entry


def _target(entry: Mapping[str, Any]) -> Target:
    if entry["kind"] not in get_args(Kind):
        raise ValueError(f"kind {entry['kind']!r}")
    return Target(entry["name"], entry["kind"], tuple(entry["shape"]), entry["dtype"], entry.get("factors"))


def _port(entry: Mapping[str, Any]) -> Port:
    varies = Varies(**entry["varies"]) if entry["varies"] is not None else None
    rows = entry.get("rows")
    if rows not in {None, *get_args(OutputRows)}:
        raise ValueError(f"rows {rows!r} of {entry['name']!r}")
    return Port(entry["name"], entry["dtype"], tuple(entry["shape"]), varies, entry.get("pad"), rows)

"""Description of a bundle: `manifest.json`, parsed strictly.

schema      version of the file's layout
name        name of the bundle
base        digest of all weights, and per weight its shape, dtype, digest and position in weights.data
targets     weights that adapters may change, with their layer kind (see `slots`)
rows        "each": one run serves rows of different adapters; "group": one adapter per run, with the reason
rows_reasons    weight that takes one adapter per run -> reason
inputs, outputs, files, max_rank, gate
oracles     per task of the export, the reference that its forms were compared with beside the merged base: the forward
            of the training library on the adapter's file ("peft 0.21.2"), or "merged" and the reason; the largest
            error; and the digest of the adapter
empty       free sizes that may be 0, as tested at export: the past of a decoder's first step
tolerance   relative error in float32 that the caller of the export accepted, if above the limit of 1e-5
left_out    per task of the export, the tensors of its adapter's file that the task leaves out, with the reason
rounding    for a 16-bit base: error of its forward against the same in 32 bits, and the limits derived from it
text        file of the folder text/ (see `text_files`) -> its digest and size; empty for a bundle without text
quantised   for a base that the export quantised, how, and its distance from the base in floating point; null for others
decoder     for a decoder in slot form (docs/internals/slot-form.md), its ports; null for other bundles
digest      SHA-256 of all other fields

The manifest of a bundle with several components has schema 2 and the fields `name`, `producer`, `digest` and

components  component -> SHA-256 of its manifest.json, which describes its graphs as above; in the order of the export
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import msgspec

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.packing import Packed
from tpeft_deploy.bundle.quantised import Quantised
from tpeft_deploy.bundle.slots import Target
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
COMPONENTS_SCHEMA = 2
Rows = Literal["each", "group"]
OutputRows = Literal["each", "shared", "joint"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_FREE = re.compile(r"[A-Za-z_]\w*")  # a symbol in a size, which may be a sum: past + sequence


def is_name(name: str) -> bool:
    """Whether a string is a valid name of a bundle or a task."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """Check the name of a bundle or a task, and return it.

    Args:
        name: name to check.
        what: "bundle" or "task", for messages.

    Raises:
        BundleError: the name does not match `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}`.
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
    """An output axis with a size that depends on the task: `times` C + `plus`, for C classes of the task's head.

    Args:
        axis: index of the axis; the entries of a narrower head come first.
        override: weight with C rows.
        times: number of entries for each row.
        plus: number of entries before those of the first row.
    """

    axis: int
    override: str
    times: int = 1
    plus: int = 0


@dataclass(frozen=True)
class Port:
    """An input or output of the model; a string in a shape is a free size, equal for equal strings.

    Args:
        name: name of the input or output.
        dtype: NumPy name of the dtype.
        shape: sizes of the axes.
        varies: axis of an output with a size that depends on the task.
        pad: value with which the free axes of an input, except the batch, may be padded at the end; None if rows of
            different lengths cannot share a run.
        rows: for an output, "each": entry r of the first axis depends on row r alone; "shared": no batch axis, and the
            same for all rows and adapters; "joint": depends on several rows, or on the adapter without a batch axis,
            and is therefore undefined for a batch of several tasks or callers.  None in bundles without the field.
        below: rows of the smallest weight that an integer input picks rows of: values are below it and, as negative
            ones count from the end, not below `-below`.  None where no such limit is known.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    varies: Varies | None = None
    pad: int | float | None = None
    rows: OutputRows | None = None
    below: int | None = None


@dataclass(frozen=True)
class Weight:
    """A base weight and the position of its bytes in weights.data (little-endian, row-major)."""

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
    """Error of a 16-bit base against the same base computed in 32 bits, and the limits for its exports.

    Args:
        dtype: float16 or bfloat16.
        measured: output name -> largest relative error of a row; empty if it could not be measured.
        limits: output name -> largest relative error allowed in a 16-bit export.
        reason: cause of a missing measurement; the limits are then fixed ones.
    """

    dtype: str
    measured: Mapping[str, float]
    limits: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Manifest:
    """The manifest; `to_json` and `from_json` are exact inverses.

    Args:
        aliases: further name of a weight -> stored name.
        ties: for each tensor that several modules of the model share, one name per module; a name that is neither a
            weight nor an alias is not read by the forward pass.
        tolerance: relative error accepted for float32 weights; None for the limit of 1e-5.
        left_out: task -> tensor -> reason, as `Adapter.left_out`.
        packing: inputs of banked.cuda.onnx that replace inputs of banked.onnx.
        stacking: inputs of factored.cuda.onnx that replace inputs of factored.onnx.
        components: component -> digest of its manifest, for a bundle with several, which has no graphs itself; its
            `aliases` and `ties` are then those of all components.
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
    stacking: tuple[Packed, ...] = ()
    decoder: DecoderPorts | None = None
    text: Mapping[str, FileRecord] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    quantised: Quantised | None = None

    @property
    def records(self) -> dict[str, FileRecord]:
        """All files with recorded digests, by their paths in the bundle."""
        return {**self.files, **{f"text/{name}": record for name, record in self.text.items()}}

    @classmethod
    def of_components(cls, name: str, producer: str, components: Mapping[str, str]) -> Manifest:
        """Make the manifest of a bundle with several components."""
        return cls(name=name, producer=producer, components=components, **_NO_GRAPHS)

    @property
    def base_digest(self) -> str:
        """SHA-256 over the names and digests of all base weights."""
        return base_digest({name: weight.digest for name, weight in self.weights.items()})

    @cached_property
    def batch_axis(self) -> str | None:
        """Name of the free batch size: the first axis of the first input with a free first axis."""
        firsts = [port.shape[0] for port in self.inputs if port.shape]
        return next((size for size in firsts if isinstance(size, str)), None)

    def batch_axes(self, port: Port) -> list[int]:
        """Axes of a port with a size that depends on the batch, "2*batch" included."""
        batch = self.batch_axis
        return [axis for axis, size in enumerate(port.shape) if batch is not None and batch in _FREE.findall(str(size))]

    @cached_property
    def paddable(self) -> frozenset[str]:
        """Names of the free sizes along which shorter rows may be padded; never the batch.

        Every input with such a size has a padding value (`Port.pad`) and no sum with the size: padding the end of
        `past + sequence` is not padding the end of `past`.  Outputs are trimmed along these sizes.
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
        """Stored name of a weight; a module that is registered twice has several names."""
        return self.aliases.get(name, name)

    @cached_property
    def stored(self) -> Mapping[str, str]:
        """Every name of a weight in the graphs -> stored name."""
        return {name: name for name in self.weights} | dict(self.aliases)

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """Aliases that are further names of the same module: a change under either name is the same change."""
        tied = {name for group in self.ties for name in group}
        return {alias: name for alias, name in self.aliases.items() if alias not in tied}

    def uses(self, name: str) -> list[str]:
        """Names of all modules that use a stored weight; several if it was exported tied."""
        found = [other for group in self.ties for other in group if self.stored.get(other) == name]
        return found or [name]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all base weights in weights.data; shared storage counts once."""
        places = {(weight.offset, weight.length) for weight in self.weights.values()}
        return sum(length for _, length in places) + (self.quantised.bytes if self.quantised is not None else 0)

    def to_json(self) -> str:
        """Serialise to the text of manifest.json."""
        if self.components:
            fields: dict[str, Any] = {"schema": COMPONENTS_SCHEMA, "name": self.name, "producer": self.producer}
            fields["components"] = dict(self.components)
            return json.dumps(fields | {"digest": _digest(fields)}, indent=1) + "\n"
        document = asdict(self)
        del document["components"]
        document["base"] = {"digest": self.base_digest, "weights": document.pop("weights")}
        document["schema"] = SCHEMA
        document["digest"] = _digest(document)
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Manifest:
        """Parse the text of manifest.json.

        Args:
            text: content of the file.
            source: path of the file, for messages.

        Raises:
            VersionError: this version does not read the schema.
            IntegrityError: the text is damaged or edited, or holds a file name outside the bundle.
        """
        try:
            document = json.loads(text)
            schema = document["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(
                f"read {source}", expected="a bundle's manifest", got=f"text that is not one ({error!r})"
            ) from error
        if schema not in (SCHEMA, COMPONENTS_SCHEMA):
            raise VersionError(
                f"read {source}",
                expected=f"schema {SCHEMA} or {COMPONENTS_SCHEMA}",
                got=schema,
                fix="Use the version of tpeft-deploy that wrote it, or export again.",
            )
        try:
            manifest = _parse(cls, document) if schema == SCHEMA else _parse_components(cls, document)
        except (msgspec.ValidationError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"read {source}", problem=f"a field is missing or malformed ({error!r})") from error
        _check_digests(document, manifest, source)
        return manifest


_NO_GRAPHS: Mapping[str, Any] = {
    "weights": {},
    "aliases": {},
    "targets": (),
    "inputs": (),
    "outputs": (),
    "files": {},
    "rows": "each",
    "rows_reason": "",
}


def base_digest(digests: Mapping[str, str]) -> str:
    """Compute the SHA-256 of the sorted lines "name digest" of a base's weights."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _digest(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_digests(document: Mapping[str, Any], manifest: Manifest, source: str) -> None:
    checks = {"the manifest's digest": (_digest(document), document.get("digest"))}
    if not manifest.components:
        checks["the base digest"] = (manifest.base_digest, document["base"].get("digest"))
    for what, (expected, got) in checks.items():
        if expected != got:
            raise IntegrityError(
                f"read {source}, {what}",
                expected=f"{expected[:12]}...",
                got=f"{str(got)[:12]}...",
                fix="The manifest was edited or damaged: export the bundle again.",
            )
    for name in [*manifest.files, *manifest.text]:
        if "/" in name or "\\" in name or name.startswith(".") or not name:
            raise IntegrityError(f"read {source}, file {name!r}", expected="a plain name inside the bundle", got=name)


def _parse(cls: type[Manifest], document: Mapping[str, Any]) -> Manifest:
    fields = {**document, "weights": document["base"]["weights"], "ties": _ties(document), "components": {}}
    manifest = msgspec.convert(fields, cls)
    if manifest.tolerance is not None and not 0 < manifest.tolerance <= WIDEST_TOLERANCE:
        raise ValueError(f"tolerance {manifest.tolerance!r}")
    return manifest


def _parse_components(cls: type[Manifest], document: Mapping[str, Any]) -> Manifest:
    given = {key: document[key] for key in ("name", "producer", "components")}
    manifest = msgspec.convert({**_NO_GRAPHS, **given}, cls)
    wrong = [name for name in manifest.components if not is_name(name)]
    if wrong or not manifest.components:
        raise ValueError(f"component {wrong[0]!r}" if wrong else "no components")
    return manifest


def _ties(document: Mapping[str, Any]) -> Any:
    """Tied names; in a bundle of an earlier version without the field, every alias may be tied."""
    if "ties" in document:
        return document["ties"]
    groups: dict[str, list[str]] = {}
    for alias, name in sorted(dict(document["aliases"]).items()):
        groups.setdefault(name, [name]).append(alias)
    return list(groups.values())

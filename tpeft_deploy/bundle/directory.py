"""Bundle: the directory that an export writes and the runtime reads.

    bundle/
      manifest.json        description of the bundle (see `manifest`)
      base.onnx  factored.onnx  banked.onnx  weights.data
      factored.cpu.onnx  banked.cpu.onnx        if there is a faster form that only the CPU can run
      banked.cuda.onnx                          if linear layers have branches: fewer operators
      genai_config.json    settings of onnxruntime-genai, if it can drive factored.onnx
      example.npz          example inputs of the export, on which `verify` runs the bundle
      adapters/<task>/current                   digest that the task is an alias for
      adapters/<task>/<digest>/adapter.safetensors  adapter.json  adapter.onnx_adapter
      folded/<task>.onnx
      text/                tokenizer and chat templates (see `text_files`), if the base has text

Files are never edited in place.  Adding a task writes one directory and renames one file; graphs and other tasks are
not changed.  An adapter's digest is the SHA-256 of its adapter.safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit, slots
from tpeft_deploy.bundle.fit import Filled
from tpeft_deploy.bundle.manifest import FileRecord, Manifest, check_name, is_name
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.errors import BundleError, IntegrityError, UnknownTask
from tpeft_deploy.files import digest_file, new_directory, remove_directory, replace_text
from tpeft_deploy.formats import canonical
from tpeft_deploy.formats.read.base_view import Lazy
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.write import onnx_adapter
from tpeft_deploy.tucker import Array

__all__ = ["BANKED_CPU", "BANKED_CUDA", "BASE_TASK", "EXAMPLE", "FACTORED_CPU", "MANIFEST", "Bundle", "check_task"]

BASE_TASK = "base"
MANIFEST = "manifest.json"
EXAMPLE = "example.npz"
FACTORED_CPU, BANKED_CPU = "factored.cpu.onnx", "banked.cpu.onnx"
BANKED_CUDA = "banked.cuda.onnx"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.  The manifest never changes; tasks are read from the directory at each call.

    Args:
        path: directory of the bundle.
        manifest: parsed manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle: parse its manifest and check that every file exists and has its recorded size.

        Args:
            path: directory of the bundle.

        Raises:
            BundleError: there is no bundle at the path.
            VersionError: this version does not read the manifest's schema.
            IntegrityError: the manifest is damaged, or a file is missing or has another size.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise BundleError(
                f"open bundle {path}",
                expected=f"a directory with {MANIFEST}",
                got="a directory without one" if path.is_dir() else "no such directory",
                fix="Write one with 'tpeft-deploy export bundle'.",
            )
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise IntegrityError(f"read {file}", expected="UTF-8 text", got=str(error)) from error
        bundle = cls(path, Manifest.from_json(text, source=str(file)))
        for name, record in bundle.manifest.records.items():
            bundle._check_size(name, record)
        return bundle

    def check_file(self, name: str) -> Path:
        """Check the digest of a file that the manifest lists (its `records`), and return its path.

        Raises:
            IntegrityError: the digest differs.
        """
        file, record = self.path / name, self.manifest.records[name]
        self._check_size(name, record)
        digest = digest_file(file)
        if digest != record.sha256:
            raise IntegrityError(
                f"open bundle {self.path}, file {name!r}",
                expected=f"digest {record.sha256[:12]}...",
                got=f"{digest[:12]}...",
                fix="The file was altered or damaged: export the bundle again.",
            )
        return file

    @property
    def tasks(self) -> dict[str, str]:
        """Task -> digest of its current adapter, sorted by task."""
        # A writer that was killed may leave temporary directories, with names that begin with a dot.
        found = sorted((self.path / "adapters").glob("[!.]*/current"))
        return {file.parent.name: self._alias(file) for file in found}

    def adapter(self, task: str) -> Adapter:
        """Read a task's current adapter.

        Raises:
            UnknownTask: the bundle has no such task.
            IntegrityError: a file is missing or differs from its digest.
        """
        return self.version(task, self.digest(task))

    def version(self, task: str, digest: str, *, native: bool = True) -> Adapter:
        """Read the current or an earlier version of a task's adapter.

        Args:
            task: name of a task of the bundle.
            digest: digest of the adapter.
            native: also check the .onnx_adapter file, from which the adapter is not read.

        Raises:
            IntegrityError: a file is missing or differs from its digest.
        """
        place = self.path / "adapters" / task / digest
        doing = f"open task {task!r} of bundle {self.path}"
        try:
            record = json.loads((place / "adapter.json").read_text(encoding="utf-8"))
            recorded = {"adapter.json": record["digest"], **record["files"]}
            if not native:
                del recorded[onnx_adapter.FILE]
            data = (place / canonical.FILE).read_bytes()
            found = {"adapter.json": digest, canonical.FILE: hashlib.sha256(data).hexdigest()}
            if native:
                found[onnx_adapter.FILE] = digest_file(place / onnx_adapter.FILE)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                doing,
                expected=f"{canonical.FILE}, {onnx_adapter.FILE} and adapter.json under {digest[:12]}...",
                got=f"one that cannot be read ({error})",
                fix="Add the adapter again.",
            ) from error
        for name, value in [(canonical.FILE, digest), *recorded.items()]:
            if found.get(name) != value:
                raise IntegrityError(
                    f"{doing}, file {name!r}",
                    expected=f"digest {str(value)[:12]}...",
                    got=f"{str(found.get(name))[:12]}...",
                    fix="The file was altered or damaged: add the adapter again.",
                )
        return canonical.from_bytes(data, source=f"task {task!r} of {self.path}")

    def digest(self, task: str) -> str:
        """Digest of a task's current adapter.

        Raises:
            UnknownTask: the bundle has no such task.
        """
        file = self.path / "adapters" / task / "current"
        if not is_name(task) or not file.is_file():
            raise UnknownTask(
                f"open task {task!r} of bundle {self.path}",
                expected=f"one of {', '.join(self.tasks) or 'no tasks at all'}",
                got=repr(task),
                fix=f"Add it with 'tpeft-deploy adapter add {self.path} {task}=ADAPTER'.",
            )
        return self._alias(file)

    def oracle(self, task: str) -> dict[str, Any]:
        """Comparison of a task's adapter when the bundle was exported: keys `oracle`, `reason`, `error`, `digest`.

        The oracle of an adapter that was added later is "merged": the bundle has no torch module, which the training
        library would need.

        Raises:
            UnknownTask: the bundle has no such task.
        """
        digest, record = self.digest(task), self.manifest.oracles.get(task, {})
        if record.get("digest") == digest:
            return dict(record)
        reason = "the manifest records no comparison: the adapter was added later, or by an earlier version"
        return {"oracle": "merged", "reason": reason, "error": None, "digest": digest}

    def fill(self, adapter: Adapter) -> dict[str, dict[str, Array]]:
        """Compute an adapter's slots: target key (see `fit`) -> slot name -> array with the adapter's ranks.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit this bundle.
        """
        return fit.fill(self.manifest, adapter, bundle=str(self.path), base_value=self.base_value)

    def factors(self, task: str) -> dict[str, Array]:
        """Tensors of a task by the names of factored.onnx's optional inputs; inputs left out default to the base."""
        return self.feeds(self.adapter(task))

    def feeds(self, adapter: Adapter) -> dict[str, Array]:
        """Like `factors`, for an adapter that need not be in the bundle.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit this bundle.
        """
        return fit.named(self.manifest, self.fill(adapter))

    def native(self, task: str) -> dict[str, Array]:
        """Read a task's .onnx_adapter file; its tensors equal `factors(task)`.

        Raises:
            UnknownTask: the bundle has no such task.
            IntegrityError: ONNX Runtime cannot read the file.
        """
        return onnx_adapter.read(self.path / "adapters" / task / self.digest(task) / onnx_adapter.FILE)

    def example(self) -> dict[str, Array]:
        """Read the example inputs that the base was exported with, as contiguous arrays.

        Raises:
            IntegrityError: the file was altered, cannot be read, or lacks an input that the manifest names.
        """
        file = self.check_file(EXAMPLE)
        names = [port.name for port in self.manifest.inputs]
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: np.asarray(archive[name], order="C") for name in names}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise IntegrityError(
                f"read {file}", expected=f"one array for each of {', '.join(names)}", got=str(error)
            ) from error

    @property
    def base_view(self) -> BaseView:
        """Base weights for `load_adapter(base=...)`, each read from weights.data on access."""
        stored = dict(self.manifest.stored)
        for group in self.manifest.ties:  # a name that no forward pass reads has the values of a tied name
            held = next((stored[name] for name in group if name in stored), None)
            stored |= {name: held for name in group if held is not None and name not in stored}
        values = Lazy(stored, lambda name: self.base_value(stored[name]))
        known = {name: self.manifest.weights[held] for name, held in stored.items()}
        shapes = {name: weight.shape for name, weight in known.items()}
        digests = {name: weight.digest for name, weight in known.items()}
        return BaseView(f"bundle {self.path}", values, shapes=shapes, digests=digests)

    def default(self, target: Target) -> dict[str, Array]:
        """Slots of a target for the base: zero change, or the base's tensor for an override."""
        if target.kind == "override":
            return {"value": self.base_value(target.name)}
        return slots.neutral(target)

    def sizes(self, adapter: Adapter | None) -> dict[str, int]:
        """Output that varies per task -> size of its varying axis for an adapter; None is the base."""
        return fit.sizes(self.manifest, adapter)

    def base_value(self, name: str) -> Array:
        """Read a base weight from weights.data: (O, I, K1, ...); bfloat16 as float32.

        A weight that the graphs hold quantised is filled with NaN.
        """
        weight = self.manifest.weights[name]
        if not weight.length:
            # Quantised in the graphs: its shape is valid, and any result computed from it is refused as not finite.
            return np.full(weight.shape, np.nan, np.float32)
        with (self.path / "weights.data").open("rb") as stream:
            stream.seek(weight.offset)
            data = stream.read(weight.length)
        if weight.dtype == "bfloat16":
            bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            return bits.view(np.float32).reshape(weight.shape)
        return np.frombuffer(data, weight.dtype).reshape(weight.shape).copy()

    def add(self, task: str, adapter: Adapter) -> str:
        """Store an adapter as the current version of a task, atomically; earlier versions stay on disk.

        Args:
            task: name of a new or an existing task.
            adapter: adapter that fits the bundle's base and branches.

        Returns:
            Digest of the adapter.

        Raises:
            BundleError: the task name is not allowed.
            UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit; nothing was written.
        """
        check_task(task, self.manifest.name)
        filled = self.fill(adapter)
        data = adapter.to_bytes()
        digest = hashlib.sha256(data).hexdigest()
        place = self.path / "adapters" / task / digest
        if place.is_dir() and not self._intact(task, digest):
            remove_directory(place)
        if not place.is_dir():
            with new_directory(place) as new:
                self._write(new, task, digest, adapter, data, filled)
        self._drop_folded(task)
        replace_text(place.parent / "current", digest + "\n")
        return digest

    def remove(self, task: str) -> None:
        """Remove a task with all its versions.

        Raises:
            UnknownTask: the bundle has no such task.
        """
        self.digest(task)
        self._drop_folded(task)
        remove_directory(self.path / "adapters" / task)

    def _write(
        self,
        place: Path,
        task: str,
        digest: str,
        adapter: Adapter,
        data: bytes,
        filled: Filled,
    ) -> None:
        (place / canonical.FILE).write_bytes(data)
        onnx_adapter.write(place / onnx_adapter.FILE, fit.named(self.manifest, filled))
        record = {
            "schema": 1,
            "task": task,
            "digest": digest,
            "base": self.manifest.base_digest,
            "parameters": adapter.parameters,
            "ranks": {name: list(delta.ranks) for name, delta in adapter.deltas.items()},
            "overrides": {name: list(array.shape) for name, array in adapter.overrides.items()},
            "left_out": dict(adapter.left_out),
            "files": {name: digest_file(place / name) for name in (canonical.FILE, onnx_adapter.FILE)},
        }
        (place / "adapter.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    def _intact(self, task: str, digest: str) -> bool:
        try:
            self.version(task, digest)
        except IntegrityError:
            return False
        return True

    def _alias(self, file: Path) -> str:
        digest = file.read_text(encoding="utf-8", errors="replace").strip()
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise IntegrityError(
                f"open task {file.parent.name!r} of bundle {self.path}, file {file.name!r}",
                expected="a SHA-256 digest in hexadecimal",
                got=repr(digest[:20]),
                fix="Add the adapter again.",
            )
        return digest

    def _check_size(self, name: str, record: FileRecord) -> None:
        file = self.path / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            raise IntegrityError(
                f"open bundle {self.path}, file {name!r}",
                expected=f"{record.bytes} bytes",
                got="no file" if size is None else f"{size} bytes",
                fix="The bundle is incomplete: copy or export it again.",
            )

    def _drop_folded(self, task: str) -> None:
        # Merged weights of an earlier version would otherwise be served for the new one.
        for file in (f"{task}.onnx", f"{task}.onnx.data"):
            (self.path / "folded" / file).unlink(missing_ok=True)


def check_task(task: str, bundle: str) -> str:
    """Check a task name and return it.

    Args:
        task: name to check.
        bundle: name of the bundle.

    Raises:
        BundleError: the name is malformed, or is the name of the base or of the bundle.
    """
    check_name(task, "task")
    if task in (BASE_TASK, bundle):
        raise BundleError(
            f"name a task {task!r}",
            expected="a name that is not in use",
            got=f"the name of {'the base' if task == BASE_TASK else 'the bundle'}",
            fix="Choose another name.",
        )
    return task

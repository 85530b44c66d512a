"""Bundle: the directory that an export writes and the runtime reads.

    bundle/
      manifest.json        description of the bundle (see `manifest`)
      base.onnx  factored.onnx  banked.onnx  weights.data
      factored.cpu.onnx  factored.cuda.onnx  banked.cpu.onnx  banked.cuda.onnx  banked.rows.onnx  if faster for one use
      choice.onnx  genai_config.json    of a decoder: largest logits; settings of onnxruntime-genai for factored.onnx
      example.npz          example inputs of the export, on which `verify` runs the bundle
      adapters/<task>/current                   digest that the task is an alias for
      adapters/<task>/<digest>/adapter.safetensors  adapter.json  adapter.onnx_adapter
      folded/<task>.onnx
      text/                tokenizer and chat templates (see `text_files`), if the base has text

A bundle with several components has at its top manifest.json and adapters, each with one `<component>.onnx_adapter` per
component, and under components/<component>/ all other files of the list, as in a bundle of one graph.

Files are never edited in place.  Adding a task writes one directory and renames one file; graphs and other tasks are
not changed.  An adapter's digest is the SHA-256 of its adapter.safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tpeft_deploy.adapter import Adapter, without
from tpeft_deploy.bundle import fit, slots, split
from tpeft_deploy.bundle.base_weights import read_arrays, read_weight, view_of
from tpeft_deploy.bundle.manifest import FileRecord, Manifest, base_digest
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.bundle.task_store import BASE_TASK, Share, TaskStore, check_task
from tpeft_deploy.errors import BundleError, IntegrityError
from tpeft_deploy.files import digest_file
from tpeft_deploy.formats.read.base_view import joint_view
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.write import onnx_adapter
from tpeft_deploy.ties import changed_names
from tpeft_deploy.tucker import Array

__all__ = [
    "BANKED_CPU",
    "BANKED_CUDA",
    "BANKED_ROWS",
    "CHOICE",
    "BASE_TASK",
    "COMPONENTS",
    "EXAMPLE",
    "FACTORED_CPU",
    "FACTORED_CUDA",
    "MANIFEST",
    "MODEL",
    "Bundle",
    "check_task",
]

MODEL = "model"  # component of a bundle of one graph
COMPONENTS = "components"
MANIFEST, EXAMPLE = "manifest.json", "example.npz"
FACTORED_CPU, FACTORED_CUDA, BANKED_CPU = "factored.cpu.onnx", "factored.cuda.onnx", "banked.cpu.onnx"
BANKED_CUDA, BANKED_ROWS = "banked.cuda.onnx", "banked.rows.onnx"
CHOICE = "choice.onnx"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, or one of its components.  The manifest never changes; tasks are read at each call.

    A bundle with several components has no graphs itself: what it computes for all of them has keys
    `<component>/<key>`.  A component takes whole adapters and uses the part that changes its weights.

    Args:
        path: directory of the bundle, or of the component.
        manifest: parsed manifest.
        parts: components of a bundle with several; empty otherwise.
        share: for one of several components, what it has of the bundle.
    """

    path: Path
    manifest: Manifest
    parts: Mapping[str, Bundle] = field(default_factory=dict)
    share: Share | None = None

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
        return bundle._with_parts() if bundle.manifest.components else bundle

    def _with_parts(self) -> Bundle:
        """Open the components, each with the digest of its manifest that this bundle's manifest names."""
        opened = {}
        for name, digest in self.manifest.components.items():
            place = self.path / COMPONENTS / name
            opened[name] = Bundle.open(place)
            found = digest_file(place / MANIFEST)
            if found != digest or opened[name].manifest.components:
                raise IntegrityError(
                    f"open bundle {self.path}, manifest of component {name!r}",
                    expected=f"one of a single graph with digest {digest[:12]}...",
                    got=f"{found[:12]}...",
                    fix="The bundle was altered or damaged: export it again.",
                )
        return self.joined(opened)

    def joined(self, parts: Mapping[str, Bundle]) -> Bundle:
        """Make a bundle of components, each opened at its place.

        Args:
            parts: component -> bundle of one graph.
        """
        manifests = {name: part.manifest for name, part in parts.items()}
        names = split.taken_names(
            {name: manifest.stored for name, manifest in manifests.items()},
            {name: manifest.ties for name, manifest in manifests.items()},
        )
        store = TaskStore(self.path, tuple(map(_native, parts)))
        shared = {name: replace(part, share=Share(name, store, names[name])) for name, part in parts.items()}
        aliases = {alias: held for manifest in manifests.values() for alias, held in manifest.aliases.items()}
        ties = tuple(dict.fromkeys(group for manifest in manifests.values() for group in manifest.ties))
        read = frozenset[str]().union(*names.values())
        left_out = {
            task: {name: reason for name, reason in record.items() if name not in read}
            for manifest in manifests.values()
            for task, record in manifest.left_out.items()
        }
        joint = replace(self.manifest, aliases=aliases, ties=ties, left_out=left_out)
        return replace(self, parts=shared, manifest=joint)

    @property
    def components(self) -> Mapping[str, Bundle]:
        """Components in the order of the export; a bundle of one graph is one component named "model"."""
        return self.parts or {MODEL: self}

    @property
    def base_digest(self) -> str:
        """SHA-256 over the names and digests of the base weights of all components."""
        weights = [part.manifest.weights for part in self.components.values()]
        return base_digest({name: weight.digest for held in weights for name, weight in held.items()})

    @cached_property
    def store(self) -> TaskStore:
        """Adapters on disk, which all components share."""
        natives = tuple(map(_native, self.parts)) or (onnx_adapter.FILE,)
        return self.share.store if self.share is not None else TaskStore(self.path, natives)

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
        return self.store.tasks

    def adapter(self, task: str) -> Adapter:
        """Read a task's current adapter, whole.

        Raises:
            UnknownTask: the bundle has no such task.
            IntegrityError: a file is missing or differs from its digest.
        """
        return self.version(task, self.digest(task))

    def version(self, task: str, digest: str, *, native: bool = True) -> Adapter:
        """Read the current or an earlier version of a task's adapter, whole.

        Args:
            task: name of a task of the bundle.
            digest: digest of the adapter.
            native: also check the .onnx_adapter files, from which the adapter is not read.

        Raises:
            IntegrityError: a file is missing or differs from its digest.
        """
        return self.store.version(task, digest, native=native)

    def digest(self, task: str) -> str:
        """Digest of a task's current adapter.

        Raises:
            UnknownTask: the bundle has no such task.
        """
        return self.store.digest(task)

    def part(self, adapter: Adapter) -> Adapter | None:
        """Reduce a whole adapter to the changes that this component takes; None if it takes none."""
        if self.share is None:
            return without(adapter, split.unread_weights(self.manifest))
        return split.part_of(adapter, self.share.names)

    def oracle(self, task: str) -> dict[str, Any]:
        """Comparison of a task's adapter when the bundle was exported: keys `oracle`, `reason`, `error`, `digest`.

        The oracle of an adapter that was added later is "merged": the bundle has no torch module, which the training
        library would need.

        Raises:
            UnknownTask: the bundle has no such task.
        """
        if self.parts:
            compared = [part for part in self.parts.values() if task in part.manifest.oracles]
            return split.joint_oracle([part.oracle(task) for part in compared or self.parts.values()])
        digest, record = self.digest(task), self.manifest.oracles.get(task, {})
        if record.get("digest") == digest:
            return dict(record)
        reason = "the manifest records no comparison: the adapter was added later, or by an earlier version"
        return {"oracle": "merged", "reason": reason, "error": None, "digest": digest}

    def _joined(self, read: Callable[[Bundle], Mapping[str, _T]]) -> dict[str, _T]:
        return {f"{name}/{key}": value for name, part in self.parts.items() for key, value in read(part).items()}

    def check_taken(self, adapter: Adapter, *, bundle: str | None = None) -> None:
        """Check that each change is taken by a component, if there are several."""
        names = {name: part.share.names for name, part in self.parts.items() if part.share is not None}
        if names:
            doing = f"fit {adapter.source} to bundle {bundle or self.path}"
            split.check_taken(without(adapter, split.unread_weights(self.manifest)), names, doing=doing)

    def fill(self, adapter: Adapter, *, bundle: str | None = None) -> dict[str, dict[str, Array]]:
        """Compute an adapter's slots: target key (see `fit`) -> slot name -> array; messages name `bundle` or the path.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit this bundle.
        """
        if self.parts:
            self.check_taken(adapter, bundle=bundle)
            return self._joined(lambda component: component.fill(adapter, bundle=bundle))
        part, name = self.part(adapter), bundle or str(self.path)
        return {} if part is None else fit.fill(self.manifest, part, bundle=name, base_value=self.base_value)

    def factors(self, task: str, graph: str = "factored.onnx") -> dict[str, Array]:
        """Tensors of a task by the names of a factored graph's optional inputs; inputs left out default to the base."""
        return self.feeds(self.adapter(task), graph)

    def feeds(self, adapter: Adapter, graph: str = "factored.onnx") -> dict[str, Array]:
        """Like `factors`, for an adapter that need not be in the bundle.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit this bundle.
        """
        if self.parts:
            self.check_taken(adapter)
            return self._joined(lambda component: component.feeds(adapter, graph))
        return fit.named(self.manifest, self.fill(adapter), self.manifest.stacking if graph == FACTORED_CUDA else ())

    def native(self, task: str) -> dict[str, Array]:
        """Read a task's .onnx_adapter files; the tensors equal `factors(task)`.

        Raises:
            UnknownTask: the bundle has no such task.
            IntegrityError: ONNX Runtime cannot read the file.
        """
        if self.parts:
            return self._joined(lambda component: component.native(task))
        return self.store.native(task, _native(self.share.component) if self.share else onnx_adapter.FILE)

    def example(self) -> dict[str, Array]:
        """Read the example inputs that the base was exported with, as contiguous arrays.

        Raises:
            IntegrityError: the file was altered, cannot be read, or lacks an input that the manifest names.
        """
        if self.parts:
            return self._joined(lambda component: component.example())
        return read_arrays(self.check_file(EXAMPLE), [port.name for port in self.manifest.inputs])

    @property
    def base_view(self) -> BaseView:
        """Base weights for `load_adapter(base=...)`, each read from weights.data on access."""
        if self.parts:
            found = joint_view(f"bundle {self.path}", [part.base_view for part in self.parts.values()])
        else:
            found = view_of(f"bundle {self.path}", self.manifest, self.base_value)
        return replace(found, unread=split.unread_weights(self.manifest))

    def default(self, target: Target) -> dict[str, Array]:
        """Slots of a target for the base: zero change, or the base's tensor for an override."""
        if target.kind == "override":
            return {"value": self.base_value(target.name)}
        return slots.neutral(target)

    def sizes(self, adapter: Adapter | None) -> dict[str, int]:
        """Output that varies per task -> size of its varying axis for an adapter; None is the base."""
        if self.parts:
            return self._joined(lambda component: component.sizes(adapter))
        return fit.sizes(self.manifest, adapter)

    def base_value(self, name: str) -> Array:
        """Read a base weight from weights.data: (O, I, K1, ...); bfloat16 as float32.

        A weight that the graphs hold quantised is filled with NaN.
        """
        return read_weight(self.path / "weights.data", self.manifest.weights[name])

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
        if self.share is not None:
            raise BundleError(
                f"add task {task!r} to component {self.share.component!r}",
                expected="the whole bundle, as a task belongs to all its components",
                got="one component",
                fix="Open the bundle's directory and add the task there.",
            )
        check_task(task, self.manifest.name)
        self.check_taken(adapter)
        feeds = {name: part.feeds(adapter) for name, part in self.components.items()}
        natives = dict(zip(self.store.natives, feeds.values(), strict=True))
        unread = split.unread_weights(self.manifest)
        split.warn_unread(task, [n for n in changed_names(adapter) if n in unread], base=f"bundle {self.path}")
        digest = self.store.write(task, adapter, natives, base_digest=self.base_digest)
        self._drop_folded(task)
        self.store.alias(task, digest)
        return digest

    def remove(self, task: str) -> None:
        """Remove a task with all its versions.

        Raises:
            UnknownTask: the bundle has no such task.
        """
        self.digest(task)
        self._drop_folded(task)
        self.store.remove(task)

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
        for part in self.components.values():
            for file in (f"{task}.onnx", f"{task}.onnx.data"):
                (part.path / "folded" / file).unlink(missing_ok=True)


def _native(component: str) -> str:
    return f"{component}.onnx_adapter"

"""Adapters of a bundle on disk: versions under their digests, and for each task an alias of the current one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.manifest import check_name, is_name
from tpeft_deploy.errors import BundleError, IntegrityError, UnknownTask, did_you_mean
from tpeft_deploy.files import digest_file, new_directory, remove_directory, replace_text
from tpeft_deploy.formats import canonical
from tpeft_deploy.formats.write import onnx_adapter
from tpeft_deploy.tucker import Array

__all__ = ["BASE_TASK", "Share", "TaskStore", "check_task"]

BASE_TASK = "base"


@dataclass(frozen=True)
class TaskStore:
    """The folder `adapters` of a bundle.

    Args:
        path: directory of the bundle.
        natives: names of the `.onnx_adapter` files of each adapter, one per component.
    """

    path: Path
    natives: tuple[str, ...] = (onnx_adapter.FILE,)

    @property
    def tasks(self) -> dict[str, str]:
        """Task -> digest of its current adapter, sorted by task."""
        # A writer that was killed may leave temporary directories, with names that begin with a dot.
        found = sorted((self.path / "adapters").glob("[!.]*/current"))
        return {file.parent.name: self._alias(file) for file in found}

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
                fix=did_you_mean(task, self.tasks)
                + f"Add it with 'tpeft-deploy adapter add {self.path} {task}=ADAPTER'.",
            )
        return self._alias(file)

    def version(self, task: str, digest: str, *, native: bool = True) -> Adapter:
        """Read a version of a task's adapter; `Bundle.version` describes the arguments.

        Raises:
            IntegrityError: a file is missing or differs from its digest.
        """
        place = self.path / "adapters" / task / digest
        doing = f"open task {task!r} of bundle {self.path}"
        try:
            record = json.loads((place / "adapter.json").read_text(encoding="utf-8"))
            recorded = {"adapter.json": record["digest"], **record["files"]}
            data = (place / canonical.FILE).read_bytes()
            found = {"adapter.json": digest, canonical.FILE: hashlib.sha256(data).hexdigest()}
            for name in self.natives:
                expected = recorded.pop(name)
                if native:
                    recorded[name], found[name] = expected, digest_file(place / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(
                doing,
                expected=f"{canonical.FILE}, {', '.join(self.natives)} and adapter.json under {digest[:12]}...",
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

    def native(self, task: str, file: str) -> dict[str, Array]:
        """Read one of the natives of a task's current adapter.

        Raises:
            UnknownTask: the bundle has no such task.
            IntegrityError: ONNX Runtime cannot read the file.
        """
        return onnx_adapter.read(self.path / "adapters" / task / self.digest(task) / file)

    def write(self, task: str, adapter: Adapter, feeds: Mapping[str, Mapping[str, Array]], *, base_digest: str) -> str:
        """Store an adapter as a version of a task that is not the current one yet.

        Args:
            task: name of the task.
            adapter: adapter that fits the bundle.
            feeds: name of a native -> its tensors by input name.
            base_digest: digest of all weights of the base.

        Returns:
            Digest of the version.
        """
        data = adapter.to_bytes()
        digest = hashlib.sha256(data).hexdigest()
        place = self.path / "adapters" / task / digest
        if place.is_dir() and not self._intact(task, digest):
            remove_directory(place)
        if not place.is_dir():
            with new_directory(place) as new:
                (new / canonical.FILE).write_bytes(data)
                for name, tensors in feeds.items():
                    onnx_adapter.write(new / name, tensors)
                record = _record(task, adapter) | {"digest": digest, "base": base_digest}
                record["files"] = {name: digest_file(new / name) for name in (canonical.FILE, *feeds)}
                (new / "adapter.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return digest

    def alias(self, task: str, digest: str) -> None:
        """Make a stored version the current one of its task."""
        replace_text(self.path / "adapters" / task / "current", digest + "\n")

    def remove(self, task: str) -> None:
        """Remove a task with all its versions."""
        remove_directory(self.path / "adapters" / task)

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


@dataclass(frozen=True)
class Share:
    """What a component has of a bundle with several.

    Args:
        component: name of the component.
        store: tasks of the whole bundle.
        names: names of the weights with changes that the component takes.
    """

    component: str
    store: TaskStore
    names: frozenset[str]


def _record(task: str, adapter: Adapter) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": task,
        "parameters": adapter.parameters,
        "ranks": {name: list(delta.ranks) for name, delta in adapter.deltas.items()},
        "overrides": {name: list(array.shape) for name, array in adapter.overrides.items()},
        "left_out": dict(adapter.left_out),
    }


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

"""Changes of bundles on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx

from tpeft_deploy import Bundle
from tpeft_deploy.bundle.directory import MANIFEST
from tpeft_deploy.bundle.manifest import FileRecord, Manifest
from tpeft_deploy.files import digest_file

Change = Callable[[Bundle], object]


def write(bundle: Bundle, manifest: Manifest) -> None:
    (bundle.path / MANIFEST).write_text(manifest.to_json())


def flip_weights(bundle: Bundle) -> None:
    flip(bundle.path / "weights.data", bundle.manifest.weights["up.weight"].offset + 1)


def edit(bundle: Bundle, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(bundle.path / name, load_external_data=False)
    change(model)
    onnx.save(model, bundle.path / name)
    if name in bundle.manifest.files:
        record(bundle, name)


def minus(function: str) -> Callable[[onnx.ModelProto], None]:
    """A branch that subtracts what it should add."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = (n for f in model.functions if f.name == function for n in f.node if n.op_type == "Add")
        node.op_type = "Sub"

    return change


def record(bundle: Bundle, name: str) -> None:
    """Let the manifest say what a file has become, as someone who alters it would."""
    file = bundle.path / name
    files = {**bundle.manifest.files, name: FileRecord(digest_file(file), file.stat().st_size)}
    write(bundle, replace(bundle.manifest, files=files))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 64
    file.write_bytes(data)

"""Copies of base.onnx with packed weights, so that folded sessions share the weights that they do not change.

On the CPU every session packs the weights of its products for itself, in memory that no other process or session can
use.  ONNX Runtime can save a session's packed weights and map them from the file again; then sessions share the pages.
What a fold changes must not be in such a copy in any form: an optimiser may have transposed a weight or merged it with
others.  So the changed weights are inputs while the copy is made, from which nothing can be derived, and external
initializers without a value again after that: a session that does not bring them all cannot be opened.  Operators are
fused by each session, not in the copy, so that what depends on changed weights alone is computed once per session.

Packed weights fit the processor and the ONNX Runtime that packed them: copies belong to one process, in a directory
that it removes.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import onnxruntime

from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import Choice

__all__ = ["packed_copy"]

_GRAPH, _DATA, _NOWHERE = "base.onnx", "packed.data", "brought-by-each-session"
_SMALLEST = "1024"  # bytes; smaller initializers stay in the graph


def packed_copy(model: Path, changed: Collection[str], place: Path, *, threads: int | None = None) -> Path:
    """A copy of a graph for sessions that replace some of the weights, made when it is first asked for.

    Args:
        model: base.onnx of a bundle.
        changed: the external initializers that every session on the copy brings.
        place: a directory of this process.
        threads: intra-op threads while packing.

    Returns:
        The ONNX file, with its weights beside it: as large as the weights and what is packed of them.
    """
    key = hashlib.sha256("\n".join([str(model.resolve()), *sorted(changed)]).encode()).hexdigest()[:32]
    copy = place / key / _GRAPH
    if copy.is_file():
        return copy
    new = Path(tempfile.mkdtemp(dir=place))
    try:
        _write(model, changed, new, threads)
        try:
            new.rename(copy.parent)
        except OSError:
            if not copy.is_file():  # another thread was not the reason
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return copy


def _write(model: Path, changed: Collection[str], place: Path, threads: int | None) -> None:
    content = model.read_bytes()
    found = onnx_bytes.declared(content)
    # Sizes that a task may choose are free; of a number, an optimiser could make constants.
    free: dict[str, tuple[int | str, ...]] = {
        name: (f"{name}.C", *found[name].shape[1:]) if found[name].shape else () for name in changed
    }
    options = onnxruntime.SessionOptions()
    # ONNX Runtime computes no fused operator in advance.  Were one saved with changed weights and constants as inputs,
    # such as DeBERTa's products of relative positions, each run on the copy would compute it again.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(place / _GRAPH)
    for entry, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", _DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", _SMALLEST),
    ):
        options.add_session_config_entry(entry, value)
    # half: without blocked layouts, which convolutions with changed weights could not join any more.
    sessions = SessionFactory(Choice("cpu", "weights are packed for it"), threads, half=True)
    sessions.open(model, content=onnx_bytes.hidden(content, free), options=options)
    saved = place / _GRAPH
    tensors = {name: found[name] for name in changed}
    saved.write_bytes(onnx_bytes.shown(saved.read_bytes(), tensors, _NOWHERE))

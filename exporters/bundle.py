"""A bundle: the base traced once, three graphs that share its weights, and the adapters beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.quantised import Activations, Quantise
from tpeft_deploy.bundle.text_files import Mode, Pooling
from tpeft_deploy.errors import BundleError, ExportError
from tpeft_deploy.exporters.components import export_components, find_components, refuse_options
from tpeft_deploy.exporters.graph.unused import Unused
from tpeft_deploy.exporters.oracle.limits import check_tolerance
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.planning import plan_bundle
from tpeft_deploy.exporters.quantisation.packs import choice_of
from tpeft_deploy.exporters.writing import finish, write_graphs
from tpeft_deploy.files import new_directory
from tpeft_deploy.formats.base.model import called
from tpeft_deploy.progress import Progress, Stage, silent

__all__ = ["export_bundle"]


def export_bundle(
    base: object,
    adapters: Mapping[str, Adapter],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_rank: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    folded: bool = False,
    weights: object = None,
    rename: Mapping[str, str] | None = None,
    padding: Mapping[str, int | float] | None = None,
    resize_embeddings: bool = False,
    tolerance: float | None = None,
    unused: Unused = "error",
    exclude: Sequence[str] = (),
    generation: bool = False,
    pooling: Pooling | Mode | None = None,
    quantise: Quantise | None = None,
    activations: Activations = "int8",
    progress: Progress = silent,
) -> Bundle:
    """Export a base and adapters for it as a bundle.

    Args:
        base: a torch module, "package.module:factory", a Hugging Face model directory, or an ONNX file; or a dict of
            `Component`, for a bundle of several graphs, which a factory may return too.  Directories of
            encoder-decoder, vision-language and two-tower models give their components.
        adapters: task -> adapter.  The weights that they change get a branch, so that adapters which change the
            same weights can be added later; with no adapters every linear and conv weight gets one.
        path: the directory to write; it must not exist or be empty.
        name: the bundle's name; by default the directory's.
        max_rank: the largest rank of an adapter that the bundle takes; by default any.
        example_inputs: arrays or tensors by input name, for a module or an ONNX file; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        weights: the original weights of an ONNX file, as `load_base` takes them.
        rename: other names for inputs and outputs: the base's own -> the bundle's.
        padding: values by input name to pad rows with along free axes but the batch, so that requests of
            other lengths share a run; refused unless every answer stays as it was.  By default those of a Hugging Face
            text model's configuration, where proved; {} for none.
        resize_embeddings: give the base as many tokens as the adapters have, as `resize_token_embeddings` did before
            they were trained; its new rows are zero.
        unused: "skip" to leave out, with a warning, changes of weights that no output depends on; an error otherwise.
        exclude: names of weights or modules (`*` and `?` included) that no adapter of the bundle may change, now or
            later, such as those that `rows_reason` lists; an adapter that changes one is refused.
        generation: export a causal language model or an encoder-decoder of transformers for generation: with caches
            of fixed size that are updated in place, and for each row the length of its past (the manifest's
            `decoder`); the encoder of an encoder-decoder returns the keys and values of the decoder's cross-attention
            too.
        pooling: how the states of a text's tokens become one embedding: "cls", "mean" or "last", of length 1, or a
            `Pooling` (`tpeft_deploy.bundle.text_files`); by default as sentence-transformers' files in a directory say.
            A directory's tokenizer goes into the folder text/ with it, its labels, chat templates and defaults.  Of
            several components it is that of the one that reads `input_ids` and is no decoder.
        quantise: "int8" or "int4" to keep the weights of products in 8 or 4 bits (and for "int8" the kernels of
            convolutions); branches stay in floating point.  The distance from the base in floating point is in the
            manifest's `quantised`.
        activations: "int8" lets ONNX Runtime's CPU round the inputs of quantised products to 8 bits, by which they
            become fast; "float" does not.
        folded: also write folded/<task>.onnx for every adapter.
        tolerance: relative error to accept of weights in float32, from 1e-5, the limit otherwise, to 1e-3; it is
            written into the manifest.
        progress: called at each stage.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: the directory is not empty, or a name is not allowed.
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BundleError(
            f"export bundle {path}",
            expected="a new or empty directory",
            got="one that holds files",
            fix="Remove it or choose another.",
        )
    check_tolerance(tolerance, f"export bundle {path}")
    choice = choice_of(quantise, activations, f"export bundle {path}")
    if choice is not None and folded:
        raise ExportError(
            f"export bundle {path} with folded=",
            expected="weights in floating point",
            got=f"quantise={choice.form!r}",
            fix="Use export_folded(quantise=) for each task: it folds first and then quantises.",
        )
    name = name or path.resolve().name
    base = called(base)
    components = find_components(base, generation, pooling)
    if components is not None:
        given = [example_inputs, dynamic_shapes, weights, rename, padding, resize_embeddings]
        refuse_options(path, given)
        return export_components(
            components,
            adapters,
            path,
            name=name,
            max_rank=max_rank,
            folded=folded,
            tolerance=tolerance,
            unused=unused,
            exclude=exclude,
            choice=choice,
            progress=progress,
        )
    plan = plan_bundle(
        base,
        adapters,
        name=name,
        max_rank=max_rank,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        weights=weights,
        rename=rename,
        padding=padding,
        resize_embeddings=resize_embeddings,
        unused=unused,
        exclude=exclude,
        generation=generation,
        choice=choice,
        progress=progress,
    )
    with new_directory(path) as new:
        progress("write the graphs")
        subject = Subject(plan.base, plan.raw.graph)
        bundle = Bundle(new, write_graphs(plan, subject, new, tolerance, pooling))
        for position, (task, adapter) in enumerate(plan.adapters.items()):
            progress(Stage(f"store {task}", position, len(plan.adapters)))
            bundle.add(task, adapter)
        finish(plan, Sources(subject, keep=folded), bundle, folded=folded, progress=progress)
        Bundle.open(new)
    return Bundle.open(path)

"""The page of the architectures that the tests export: the exports take minutes, so the page is not made by each run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from docs.generate.markdown import generated, table
from tests.helpers.exporters import architectures, small_decoders, small_encoder_decoders, small_images
from tpeft_deploy import Bundle, export_bundle, load_adapter

__all__ = ["ENTRIES", "page"]

_TEXT = """
Each architecture is built small, with random weights, and exported with two adapters by `python -m docs.generate zoo`; the
tests of each section compare more of it. **Rows** says whether one run serves rows of different adapters ("each") or
one adapter ("group"). **Error** is the largest relative error of any form against the merged torch model, as the
manifest's `gate` has it, over all sizes and tasks; the limit is 1e-5 in float32, and follows from the rounding of the
base in float16. Sizes and figures of full models are in [vision](../families/vision.md), [text](../families/text.md)
and [generation](../families/generation.md).

"""
_FORMS = "tests/exporters/forms/test_architectures.py"
_DECODERS = "tests/generation/test_exactness.py"
_ENCODER_DECODERS = "tests/exporters/decoder/test_encoder_decoders.py"
_IMAGES = "tests/generation/test_images.py"


class Entry(NamedTuple):
    """An architecture of the tests.

    Attributes:
        kind: section of the page.
        name: name of the architecture.
        tests: file of its tests.
        export: exports it into a directory.
    """

    kind: str
    name: str
    tests: str
    export: Callable[[Path], Bundle]


def _net(name: str, dtype: torch.dtype) -> Callable[[Path], Bundle]:
    def export(place: Path) -> Bundle:
        module, inputs, shapes = architectures.MODELS[name]()
        adapters, module = architectures.adapters_for(module), module.to(dtype)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        target = place / "bundle"
        return export_bundle(module, adapters, target, example_inputs=inputs, dynamic_shapes=shapes, folded=True)

    return export


def _decoder(name: str) -> Callable[[Path], Bundle]:
    def export(place: Path) -> Bundle:
        adapters = {task: load_adapter(path) for task, path in small_decoders.trained(name, place).items()}
        return export_bundle(small_decoders.made(name), adapters, place / "bundle", generation=True, folded=True)

    return export


def _encoder_decoder(name: str) -> Callable[[Path], Bundle]:
    def export(place: Path) -> Bundle:
        small_encoder_decoders.made(name).save_pretrained(place / "base")
        trained = small_encoder_decoders.trained(name, place)
        adapters = {task: load_adapter(path) for task, path in trained.items()}
        return export_bundle(place / "base", adapters, place / "bundle", generation=True)

    return export


def _entries() -> Iterator[Entry]:
    for dtype in (torch.float32, torch.float16):
        for name in architectures.MODELS:
            yield Entry(f"One graph, {str(dtype).removeprefix('torch.')}", name, _FORMS, _net(name, dtype))
    for name, (kind, _, _) in small_decoders.MODELS.items():
        yield Entry("Generation", kind, _DECODERS, _decoder(name))
    for name, (kind, _, _) in small_encoder_decoders.MODELS.items():
        yield Entry("Encoder-decoders, for generation", kind, _ENCODER_DECODERS, _encoder_decoder(name))
    kind = "LlavaForConditionalGeneration"
    yield Entry("Images and text, for generation", kind, _IMAGES, small_images.exported)


ENTRIES = tuple(_entries())


def page() -> str:
    """Export all architectures, and return docs/reference/zoo.md."""
    text = _TEXT
    for kind in dict.fromkeys(entry.kind for entry in ENTRIES):
        rows = [row for entry in ENTRIES if entry.kind == kind for row in _rows(entry)]
        columns = ("architecture", "component", "changed weights", "layer kinds", "forms", "rows", "error")
        [tests] = {entry.tests for entry in ENTRIES if entry.kind == kind}
        text += f"## {kind}\n\nTests: `{tests}`.\n\n{table(columns, rows)}\n"
    return generated("Model zoo", "tests/helpers/exporters/", text, "make zoo")


def _rows(entry: Entry) -> Iterator[tuple[object, ...]]:
    with tempfile.TemporaryDirectory() as place:
        bundle = entry.export(Path(place))
        for component, part in bundle.components.items():
            manifest = part.manifest
            errors = [check["error"] for check in manifest.gate]
            forms = ", ".join(dict.fromkeys(str(check["form"]) for check in manifest.gate))
            kinds = ", ".join(dict.fromkeys(target.kind for target in manifest.targets))
            shown = "" if len(bundle.components) == 1 else component
            changed = len({target.name for target in manifest.targets})
            yield entry.name, shown, changed, kinds, forms, manifest.rows, f"{max(errors):.1e}"
    print(entry.kind, entry.name, flush=True)

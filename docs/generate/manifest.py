"""The page of the manifest and the files of a bundle, from the classes that parse them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap

from docs.generate.markdown import arguments_of, code, generated, one_line, table
from tpeft_deploy.bundle import directory, manifest, slots, text_files
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.packing import Packed

__all__ = ["page"]

_CLASSES = (
    manifest.Manifest,
    manifest.Port,
    manifest.Varies,
    slots.Target,
    manifest.Weight,
    manifest.FileRecord,
    manifest.Rounding,
    Packed,
    DecoderPorts,
)


def page() -> str:
    """Return docs/reference/manifest.md."""
    text = (
        "`tpeft_deploy.Bundle.open` reads a bundle, checks the sizes of its files and parses the manifest strictly.\n\n"
    )
    text += f"## Files\n\n{_rest(directory)}\n\n## text/\n\n{_rest(text_files)}\n\n## manifest.json\n\n"
    text += f"{_fields()}\n"
    for kind in _CLASSES:
        text += f"\n### {kind.__name__}\n\n{_summary(kind)}\n\n{_table(kind)}"
    text += f"\n## Slots\n\n{_rest(slots)}\n"
    return generated("Bundle and manifest", "tpeft_deploy/bundle/", text)


def _rest(module: object) -> str:
    return (inspect.getdoc(module) or "").partition("\n\n")[2]


def _fields() -> str:
    """Return the fields that the docstring of the manifest's module lists, as a table, and the paragraphs beside it."""
    found = re.findall(r"^(\w+) {2,}(.*(?:\n {6,}.*)*)", _rest(manifest), re.MULTILINE)
    one = [row for row in found if row[0] != "components"]
    text = table(("field", "content"), [(code(name), one_line(content)) for name, content in one])
    several = "A bundle of several components has schema 2, and only `schema`, `name`, `producer`, `digest` and `components`: "
    return f"{text}\n{several}{one_line(dict(found)['components'])}.\n"


def _summary(kind: type) -> str:
    return one_line((inspect.getdoc(kind) or "").split("\n\n")[0])


def _table(kind: type) -> str:
    docs = arguments_of(kind)
    rows = [
        (code(field.name), code(_type(field.type)), _default(field), docs.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]
    return table(("field", "type", "default", "content"), rows)


def _type(kind: object) -> str:
    return textwrap.shorten(kind if isinstance(kind, str) else str(kind), 80)


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else "empty"
    return "null" if field.default is None else "empty" if field.default in ("", ()) else code(field.default)

"""The page of the server's settings."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from annotated_types import Ge, Gt, Le

from docs.generate.markdown import attribute_docs, code, generated, table
from tpeft_deploy.cli.serve import serve
from tpeft_deploy.runtime.server.settings import Settings

__all__ = ["page"]

_TYPES = {
    "Path": "path",
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "`true` or `false`",
    "ByteSize": "bytes",
    "Seconds": "duration",
    "Numbers": "integers, separated by commas",
}
_TEXT = """
`tpeft-deploy serve` takes a setting from its flag, else from the environment, else from the file of `--config` (TOML, with
the names of the first column), else it has the default. Durations are written `500ms`, `30s`, `2m` or as seconds; bytes
`64MiB`, `2GiB` or as a number. An unknown name in the file is refused. [Running the server](../server.md) has the context.

"""


def page() -> str:
    """Return docs/reference/settings.md."""
    docs, hints = attribute_docs(Settings), _hints()
    flags = {str(option.name): option.opts[0] for option in serve.params if option.opts[0].startswith("--")}
    rows = [
        (
            *(code(name), code(f"TPEFT_{name.upper()}"), code(flags.get(name, ""))),
            *(_type(hints[name], field.metadata), _default(field.default), docs[name]),
        )
        for name, field in Settings.model_fields.items()
    ]
    columns = ("name", "environment", "flag", "type", "default", "description")
    return generated("Settings of the server", "runtime/server/settings.py", _TEXT + table(columns, rows))


def _hints() -> dict[str, str]:
    [body] = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): ast.unparse(node.annotation) for node in fields}


def _type(hint: str, metadata: list[Any]) -> str:
    hint = hint.removesuffix(" | None")
    if hint.startswith("Literal["):
        return ", ".join(f"`{choice}`" for choice in ast.literal_eval(hint.removeprefix("Literal").replace("'", '"')))
    lowest = next((f"at least {item.ge}" for item in metadata if isinstance(item, Ge) and hint != "Seconds"), "")
    above = next((f"above {item.gt}" for item in metadata if isinstance(item, Gt)), "")
    highest = next((f"at most {item.le}" for item in metadata if isinstance(item, Le)), "")
    return ", ".join(filter(None, [_TYPES[hint], lowest, above, highest]))


def _default(value: object) -> str:
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, int) and value >= 2**20 and not value % 2**20:
        unit, size = ("GiB", 2**30) if not value % 2**30 else ("MiB", 2**20)
        return code(f"{value // size}{unit}" if type(value) is not int else value)
    return "" if value is None else code(value)

"""Arguments and output that commands share: parameter types, and tables or JSON on stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from tpeft_deploy.errors import MissingExtra

if TYPE_CHECKING:
    from tpeft_deploy.bundle.directory import Bundle

__all__ = [
    "Assigned",
    "Devices",
    "Pair",
    "Provider",
    "TaskAdapter",
    "devices_option",
    "emit",
    "json_option",
    "number",
    "provider_option",
    "quantised_outputs",
    "server_packages",
    "tell_left_out",
    "tell_quantised",
    "tf32_option",
]

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")


class Provider(click.ParamType[str]):
    """An execution provider, with the number of a device if there are several."""

    name = "provider"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the choices."""
        return "[auto|cpu|cuda[:N]|openvino|tensorrt[:N]]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return a value that is well-formed; whether there is such a device shows when it is used."""
        if re.fullmatch(r"auto|cpu|openvino|(cuda|tensorrt)(:[0-9]{1,3})?", value) is None:
            known = "'auto', 'cpu', 'cuda', 'openvino', 'tensorrt', or 'cuda:N' or 'tensorrt:N' with a device number N"
            self.fail(f"{value!r} is not one of {known}.", param, ctx)
        return value


class Devices(click.ParamType[list[int]]):
    """Numbers of devices, separated by commas."""

    name = "devices"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the form."""
        return "N,N,..."

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers; whether there are such devices shows when they are used."""
        if re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", value) is None:
            self.fail(f"{value!r} is not a list of device numbers, such as 0,1.", param, ctx)
        return [int(number) for number in value.split(",")]


devices_option = click.option(
    "--devices", type=Devices(), help="Devices to serve on, such as 0,1; a number with --provider names one."
)

provider_option = click.option(
    "--provider",
    type=Provider(),
    default="auto",
    show_default=True,
    help="Execution provider of ONNX Runtime; a named one fails if it is not available, auto reports its choice.",
)

tf32_option = click.option(
    "--allow-tf32", is_flag=True, help="Compute float32 products in TF32 on CUDA: faster, with errors up to 2e-3."
)


class Assigned(NamedTuple):
    """A task, the path of its adapter, and the factor of the adapter's change."""

    task: str
    path: Path
    strength: float = 1.0


class TaskAdapter(click.ParamType[Assigned]):
    """TASK=ADAPTER or TASK=ADAPTER@STRENGTH."""

    name = "TASK=ADAPTER[@STRENGTH]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Assigned:
        """Split at the first '=', and at the last '@' before a number unless a file has that name."""
        if isinstance(value, Assigned):
            return value
        task, path = _pair(self, str(value), "sst2=adapters/sst2", param, ctx)
        place, _, strength = path.rpartition("@")
        if place and not Path(path).exists():
            try:
                return Assigned(task, Path(place), float(strength))
            except ValueError:
                pass
        return Assigned(task, Path(path))


class Pair(click.ParamType[tuple[str, Any]]):
    """A name and a value, joined by '='.

    Args:
        name: form of the argument, as --help shows it.
        example: an argument of that form.
        parse: function that converts the value, and raises ValueError.
    """

    def __init__(self, name: str, example: str, parse: Callable[[str], object] = str) -> None:
        self.name, self._example, self._parse = name, example, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Split at the first '='."""
        if isinstance(value, tuple):
            return value
        name, text = _pair(self, str(value), self._example, param, ctx)
        try:
            return name, self._parse(text)
        except ValueError:
            self.fail(f"{text!r} in {value!r} is not a number.", param, ctx)


def number(text: str) -> int | float:
    """Parse a number; without a point or exponent it is an integer."""
    return float(text) if set(text.lower()) & set(".einf") else int(text)


def _pair(
    kind: click.ParamType[Any], text: str, example: str, param: click.Parameter | None, ctx: click.Context | None
) -> tuple[str, str]:
    first, sign, second = text.partition("=")
    if not (first and sign and second):
        kind.fail(f"{text!r} is not of the form {kind.name}, as in {example}.", param, ctx)
    return first, second


def emit(document: dict[str, Any], *, key: str, columns: Sequence[str], as_json: bool) -> None:
    """Print a document as JSON, or the list under `key` as a table.

    Args:
        document: output of --json.
        key: field of the document with a list of objects.
        columns: fields of these objects that the table shows, in order.
        as_json: True for JSON, False for the table.
    """
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = [[_text(entry[column]) for column in columns] for entry in document[key]]
    for index, column in enumerate(columns):
        number = bool(rows) and all(isinstance(entry[column], int | float) for entry in document[key])
        table.add_column(column.replace("_", " "), justify="right" if number else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A pipe has no width; rich would wrap at 80 columns.
    (console if console.is_terminal else Console(width=10_000)).print(table, markup=False)


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {size}" for key, size in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return str(value)


def tell_left_out(left_out: Mapping[str, str], task: str = "") -> None:
    """Print the number of tensors of an adapter that were left out, and some of their names, for each reason."""
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        click.echo(f"{task and f'task {task}: '}left out {len(names)}, {why}: {shown}")


def quantised_outputs(bundle: Bundle) -> list[dict[str, Any]]:
    """Entries of a document: the distance of every output of a quantised base from the base in floating point."""
    return [
        {
            "output": f"{name} {output}" if bundle.parts else output,
            "quantise": own.form,
            "activations": own.activations,
            "weights": len(own.weights),
            "bytes": own.bytes,
            "error": deviation.error,
            "cosine": deviation.cosine,
            "agreement": deviation.agreement,
        }
        for name, part in bundle.components.items()
        if (own := part.manifest.quantised) is not None
        for output, deviation in own.outputs.items()
    ]


def tell_quantised(outputs: Sequence[Mapping[str, Any]]) -> None:
    """Print the entries of `quantised_outputs`."""
    for entry in outputs:
        same = "" if entry["agreement"] is None else f", same token {entry['agreement']:.1%}"
        click.echo(
            f"output {entry['output']}: {entry['weights']} weights in {entry['quantise']}, from the base in floating "
            f"point: error {entry['error']:.3g}, cosine {entry['cosine']:.6f}{same}"
        )


@contextmanager
def server_packages(doing: str) -> Iterator[None]:
    """Turn an ImportError of a package of the server extra into MissingExtra.

    Args:
        doing: operation that needs the packages, for the message.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("tpeft_deploy"):
            raise
        raise MissingExtra(
            doing, expected="the server's packages", got=str(error), fix="pip install 'tpeft-deploy[server,cpu]'."
        ) from error

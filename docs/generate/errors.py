"""The page of the errors: classes, causes, status of the server, and cures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from docs.generate.markdown import code, generated, one_line, table
from tpeft_deploy import errors
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.server.v2.statuses import status_of

__all__ = ["CURES", "classes", "page"]

_TEXT = """
`str(error)` is one line: the operation, the expected and the actual value, and a fix. The parts are also attributes:
`doing`, `problem`, `expected`, `got` and `fix`. All classes are in `tpeft_deploy.errors`; catch `TpeftError` for all of
them, or a base class for a group. The command line prints the line and exits with 1. The last column has the status with
which the server answers; classes without one reach only the operator, as status 500 and in the log. The clients of this
package raise the same classes from the status ([Calling the server](../clients.md)).
"""
_MEANS = {
    "TpeftError": "Base class of all errors that are raised on purpose",
    "AdapterError": "Errors about one adapter",
    "BundleError": "Errors about a bundle directory",
    "ExportError": "Errors about an export; nothing was written",
    "RunError": "Errors while a bundle is served",
    "ServerError": "Errors that the server returns to a client",
}
CURES: dict[str, str] = {
    "MissingExtra": "Install the extra that the message names: `pip install 'tpeft-deploy[EXTRA]'`.",
    "FormatError": "Look the method up in [Can I serve this adapter?](finder.md). Give what the message asks for: the base "
    "(`--base`, `base=`), the scale (`--scale`), or the format. Download or save a truncated file again.",
    "ShapeError": "Check that the adapter was trained on this base: same architecture, size and vocabulary.",
    "UnknownTarget": "Check the base, and the part of the adapter (`--part`). `tpeft-deploy inspect ADAPTER` lists the weights "
    "that the adapter changes.",
    "BaseMismatch": "Use the checkpoint on which the adapter was trained, or train the adapter again on this one. A conversion "
    "to another dtype changes a weight too.",
    "VersionError": "Use the version of tpeft-deploy that wrote the bundle, or export again.",
    "IntegrityError": "Copy or export the bundle again. `tpeft-deploy verify BUNDLE` checks all digests.",
    "UnsupportedBase": "Change the forward as the message says, give other example inputs, or export an ONNX file with another "
    "exporter and use that as the base.",
    "UnsupportedTarget": "Use the form that the message names, often `export folded`; train the adapter without that module; or "
    "export the bundle again with this adapter among its tasks.",
    "NotEquivalent": "The message names form, task and sizes. Run the model in float32 and in evaluation mode; check for "
    "randomness and for values that grow. `tolerance=` accepts a larger error in float32, and the manifest records it.",
    "UnknownTask": "`Runtime.residency()`, or `GET /v2/registry/tasks` with the same key, lists the tasks.",
    "InputError": "Compare names, dtypes and shapes with `manifest.json` (`inputs`), or with the model's metadata "
    "(`GET /v2/models/MODEL`).",
    "ProviderUnavailable": "Install the extra of the provider ([Execution providers](../providers.md)), or use "
    '`provider="auto"` or `"cpu"`.',
    "CapacityError": "Raise `device_bytes` or `host_bytes`, unpin tasks, or ask for fewer tasks at once. Over the server, retry.",
    "CompositionError": "Give tasks with gains, heads or replaced tensors the strength 1, and combine them with tasks that "
    "change other weights.",
    "QueueFull": "Retry after the delay, send fewer rows at once, or raise `max_queue_rows`.",
    "DeadlineExceeded": "Give a longer timeout, or look for the cause in `tpeft_queue_seconds` and `tpeft_run_seconds`.",
    "ProtocolError": "Correct the request; the message names the field. [openapi.json](../openapi.json) has the schemas.",
    "TooLarge": "Send less, or raise the setting that the message names ([Settings](settings.md)).",
    "Unauthenticated": "Send `Authorization: Bearer KEY` with a valid key; `tpeft-deploy keys create` makes one.",
    "Forbidden": "Use a key with the role that the message names ([Roles](../keys.md#roles)).",
    "NotFound": "Check the name. Names of other tenants are answered in the same way.",
    "PreconditionFailed": "Read the resource again, then repeat the change with its present tag if it is still wanted.",
    "Conflict": "Read the resource again, then repeat the change or choose another name.",
    "QuotaExceeded": "Wait for `retry_after` seconds. Without it, delete or unpin something, or ask the operator for a larger "
    "quota.",
    "Unsupported": "Use another part of the protocol; [What it does not do](../server.md#what-it-does-not-do) has the reasons.",
    "InsufficientStorage": "Retry after the operator has freed disk space. Nothing was changed.",
    "Unavailable": "Retry after the delay, or use another server.",
}


def classes() -> Iterator[tuple[str, type[TpeftError]]]:
    """Yield names and classes of all errors, the more general ones first."""
    found = (kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, TpeftError))
    kinds: list[type[TpeftError]] = [kind for kind in found if kind.__module__ == errors.__name__]
    order = {name: number for number, name in enumerate(vars(errors))}
    for kind in sorted(kinds, key=lambda kind: order[kind.__name__]):
        yield kind.__name__, kind


def page() -> str:
    """Return docs/reference/errors.md."""
    found = dict(classes())
    bases = {kind.__bases__[0] for kind in found.values()} & set(found.values())
    text = _TEXT
    for base in sorted(bases, key=list(found.values()).index):
        text += f"\n## {base.__name__}\n\n{_MEANS[base.__name__]}.\n\n"
        kinds = [kind for kind in found.values() if kind.__bases__[0] is base and kind not in bases]
        rows = [(code(kind.__name__), _cause(kind), CURES[kind.__name__], _status(kind)) for kind in kinds]
        text += table(("class", "raised", "what to do", "HTTP, gRPC"), rows)
    return generated("Errors", "tpeft_deploy/errors.py", text)


def _cause(kind: type[TpeftError]) -> str:
    summary = one_line((inspect.getdoc(kind) or "").split("\n\n")[0])
    return summary.removeprefix("Raised ").removesuffix(".")


def _status(kind: type[TpeftError]) -> str:
    status = status_of(kind("read a request"))
    return "" if status.http == 500 else f"{status.http}, `{status.grpc}`"

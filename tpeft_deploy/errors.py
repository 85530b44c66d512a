"""Everything that tpeft_deploy raises on purpose.

An error holds the operation, the problem, the expected and the actual value, and a fix; `str(error)` is one line with
all of them.  Only the command line prints or exits.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

__all__ = [
    "AdapterError",
    "BaseMismatch",
    "BundleError",
    "CapacityError",
    "CompositionError",
    "Conflict",
    "DeadlineExceeded",
    "ExportError",
    "Forbidden",
    "FormatError",
    "InputError",
    "InsufficientStorage",
    "IntegrityError",
    "MissingExtra",
    "NotEquivalent",
    "NotFound",
    "PreconditionFailed",
    "ProtocolError",
    "ProviderUnavailable",
    "QueueFull",
    "QuotaExceeded",
    "RunError",
    "ServerError",
    "ShapeError",
    "TooLarge",
    "TpeftError",
    "Unauthenticated",
    "Unavailable",
    "UnknownTarget",
    "UnknownTask",
    "Unsupported",
    "UnsupportedBase",
    "UnsupportedTarget",
    "VersionError",
    "brief",
    "did_you_mean",
    "requires",
]

_LONGEST = 10_000  # characters of a message
_LONGEST_NAME, _MOST_NAMES = 100, 1000  # comparing names takes time
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def brief(text: object, most: int = 200) -> str:
    """Put a library's message on one line of at most `most` characters, without terminal colours."""
    line = " ".join(_COLOURS.sub("", str(text)).split())
    return line if len(line) <= most else f"{line[: most - 3].rstrip()}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the most similar name, with a space at its end; empty if none is similar.

    Args:
        name: misspelt name.
        known: names that whoever asks may learn of.
    """
    from difflib import get_close_matches

    found = get_close_matches(name[:_LONGEST_NAME], list(islice(known, _MOST_NAMES)), n=1)
    return f"Did you mean {found[0]!r}? " if found else ""


class TpeftError(Exception):
    """Root of the errors above.

    Args:
        doing: operation that failed, with the adapter, task, weight or row concerned.
        problem: description of the failure, if `expected` and `got` do not give it.
        expected: expected value.
        got: actual value.
        fix: remedy for the user, as a sentence.
    """

    exit_code = 1

    def __init__(
        self,
        doing: str,
        *,
        problem: str | None = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(doing)
        self.doing = doing
        self.problem = problem
        self.expected = expected
        self.got = got
        self.fix = fix

    @property
    def said(self) -> str:
        """Problem, expected value and actual value, joined; empty if none is set."""
        parts = [self.problem] if self.problem else []
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        return ", ".join(parts)

    def __str__(self) -> str:
        text = f"{self.doing}: {self.said}" if self.said else self.doing
        if self.fix:
            text += f". {self.fix}"
        # `expected` and `got` may quote a file's content, which may hold line breaks and lone surrogates.
        return brief(text, _LONGEST).encode(errors="backslashreplace").decode()


class MissingExtra(TpeftError):
    """Raised when a feature of an optional extra is used and its packages are not installed."""


@contextmanager
def requires(package: str, extra: str, doing: str) -> Iterator[None]:
    """Turn the ImportError of a block that imports a package into MissingExtra.

    Args:
        package: package, with its purpose where that is not obvious.
        extra: optional extra that installs it.
        doing: operation that needs it.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            doing,
            expected=f"{package} to be installed",
            got=str(error) or "no such package",
            fix=f"pip install 'tpeft-deploy[{extra}]'.",
        ) from error


class AdapterError(TpeftError):
    """Base class of errors about one adapter."""


class FormatError(AdapterError):
    """Raised when files cannot be read as an adapter: unknown layout, truncated file, unused tensors, NaN."""


class ShapeError(AdapterError):
    """Raised when shapes or ranks disagree, inside an adapter or between an adapter and its base."""


class UnknownTarget(AdapterError):
    """Raised when an adapter names a weight that its base does not have."""


class BaseMismatch(AdapterError):
    """Raised when a weight of the base differs from the one that the adapter was trained on."""


class BundleError(TpeftError):
    """Base class of errors about a bundle directory."""


class VersionError(BundleError):
    """Raised when this version does not read the schema of a manifest."""


class IntegrityError(BundleError):
    """Raised when a file of a bundle is missing, truncated, altered, or lies outside the bundle."""


class ExportError(TpeftError):
    """Base class of export errors; nothing was written."""


class UnsupportedBase(ExportError):
    """Raised when a base cannot be loaded, or cannot be traced by the torch exporter."""


class UnsupportedTarget(ExportError):
    """Raised when a weight is used in the graph in a way that the requested form cannot express."""


class NotEquivalent(ExportError):
    """Raised when the outputs of the export differ from those of the merged torch model."""


class RunError(TpeftError):
    """Base class of errors while a bundle is served."""


class UnknownTask(RunError):
    """Raised when a request names a task that the runtime does not serve."""


class InputError(RunError):
    """Raised before a run when inputs do not fit the model, or tasks do not fit the rows."""


class ProviderUnavailable(RunError):
    """Raised when an execution provider that was requested by name cannot be used on this machine."""


class CapacityError(RunError):
    """Raised when adapters need more memory than a budget has, and all resident adapters are pinned or in use."""


class CompositionError(RunError):
    """Raised when a weighted set of adapters has no exact sum."""


class QueueFull(RunError):
    """Raised when the request queue holds its maximum number of rows."""


class DeadlineExceeded(RunError):
    """Raised when a request's deadline passes while it waits or runs."""


class ServerError(TpeftError):
    """Base class of errors that the server returns to a client."""


class ProtocolError(ServerError):
    """Raised when the framing, JSON or fields of a request do not conform to the protocol."""


class TooLarge(ServerError):
    """Raised when a body, tensor, header or name exceeds a limit, before memory is allocated for it."""


class Unauthenticated(ServerError):
    """Raised when a request has no key, or one that is unknown, expired or revoked."""


class Forbidden(ServerError):
    """Raised when a key is valid and its role does not allow the request."""


class NotFound(ServerError):
    """Raised when no object of the name exists, or none that the key may see."""


class Conflict(ServerError):
    """Raised when a name is taken, or the object is in a state that does not allow the change."""


class PreconditionFailed(ServerError):
    """Raised when a condition of a change, such as If-Match, is false; nothing was changed."""


class QuotaExceeded(ServerError):
    """Raised when a tenant has used up a quota.

    Args:
        doing, problem, expected, got, fix: as for `TpeftError`.
        retry_after: seconds until the same request may be allowed; None if the tenant must delete something first.
    """

    def __init__(
        self,
        doing: str,
        *,
        problem: str | None = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(doing, problem=problem, expected=expected, got=got, fix=fix)
        self.retry_after = retry_after


class Unsupported(ServerError):
    """Raised for a part of the protocol that this server does not speak."""


class InsufficientStorage(ServerError):
    """Raised when the server's disk has no room for a change; the change is rolled back."""


class Unavailable(ServerError):
    """Raised while the server is starting or draining."""

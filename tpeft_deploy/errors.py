"""Everything that tpeft_deploy raises on purpose.

    TpeftError
    ├── MissingExtra            a part of the toolkit needs a package that is not installed
    ├── AdapterError
    │   ├── FormatError         the files cannot be read as an adapter
    │   ├── ShapeError          core, factors, overrides or targets disagree in shape or rank
    │   ├── UnknownTarget       the adapter changes a weight that the base does not have
    │   └── BaseMismatch        the adapter was made for another base
    ├── BundleError
    │   ├── VersionError        the manifest has a schema that this version does not read
    │   └── IntegrityError      a file is missing, truncated or differs from its digest
    ├── ExportError
    │   ├── UnsupportedBase     the base cannot be loaded or exported
    │   ├── UnsupportedTarget   a weight is used in a way that the asked form cannot express
    │   └── NotEquivalent       the exported model does not reproduce the merged torch model
    ├── RunError
    │   ├── UnknownTask         the runtime serves no task of that name
    │   ├── InputError          an input is missing, unknown, or has the wrong dtype, shape or rows
    │   ├── ProviderUnavailable the execution provider that was asked for cannot be used
    │   ├── CapacityError       adapters need more memory than the runtime's budget, and none may leave
    │   ├── CompositionError    adapters that cannot be combined exactly, or not at the strengths given
    │   ├── QueueFull           more requests are waiting than the queue takes
    │   └── DeadlineExceeded    a request's time was over before its answer was there
    └── ServerError
        ├── ProtocolError       a request that is not what the protocol says
        ├── TooLarge            a body, tensor or name beyond a limit of the server
        ├── Unauthenticated     no key, or one that is unknown, expired or revoked
        ├── Forbidden           the key's role does not allow it
        ├── NotFound            no such route, model, version, alias, key or tenant, or none that the key may see
        ├── Conflict            the name is taken, or the thing is in a state that does not allow it
        ├── QuotaExceeded       the tenant has used up what it is allowed; says when to come again
        ├── Unsupported         a part of the protocol that this server does not speak
        ├── InsufficientStorage the server's disk is full; what was asked for is not done
        └── Unavailable         the server is starting or draining

An error carries what was being done, what was wrong, what was expected against what was found, and what to do
about it; `str(error)` is that on one line.  Only the command line prints or exits.
"""

import re

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
]

_LONGEST = 10_000  # letters of a message
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def brief(text: object, most: int = 200) -> str:
    """What a library said, on one line of bounded length and without terminal colours."""
    line = " ".join(_COLOURS.sub("", str(text)).split())
    return line if len(line) <= most else f"{line[: most - 3].rstrip()}..."


class TpeftError(Exception):
    """Root of the errors above.

    Args:
        doing: what was being done, naming the adapter, task, weight or row it was done for.
        problem: what went wrong, when `expected` and `got` do not say it already.
        expected: what should have been there.
        got: the value found instead.
        fix: what the reader can do about it, as a sentence.
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
        """The problem, what was expected, and what was there instead; empty where none of them is known."""
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
        # On one line of bounded length that UTF-8 can hold, whatever stood in the file that it is about.
        return brief(text, _LONGEST).encode(errors="backslashreplace").decode()


class MissingExtra(TpeftError):
    """Raised when a module of an optional extra is asked for and its packages are not installed."""


class AdapterError(TpeftError):
    """Something is wrong with one adapter."""


class FormatError(AdapterError):
    """Raised when files cannot be read as an adapter: unknown layout, truncated, left-over tensors, NaN."""


class ShapeError(AdapterError):
    """Raised when shapes or ranks disagree, inside an adapter or between an adapter and its base."""


class UnknownTarget(AdapterError):
    """Raised when an adapter names a weight that its base does not have."""


class BaseMismatch(AdapterError):
    """Raised when the base's weight is not the one that the adapter was trained on."""


class BundleError(TpeftError):
    """Something is wrong with a bundle directory."""


class VersionError(BundleError):
    """Raised when a manifest's schema is newer or older than this version reads."""


class IntegrityError(BundleError):
    """Raised when a file of a bundle is missing, truncated, altered, or lies outside the bundle."""


class ExportError(TpeftError):
    """Something went wrong between a model and an ONNX file; nothing was written."""


class UnsupportedBase(ExportError):
    """Raised when a base cannot be loaded, or cannot be traced by the torch exporter."""


class UnsupportedTarget(ExportError):
    """Raised when a weight is used in the graph in a way that the asked form cannot express."""


class NotEquivalent(ExportError):
    """Raised when the numeric gate fails: the export differs from the merged torch model."""


class RunError(TpeftError):
    """Something went wrong while serving a bundle."""


class UnknownTask(RunError):
    """Raised when a request names a task that the runtime does not serve."""


class InputError(RunError):
    """Raised before a run when inputs do not fit the model, or tasks do not fit the rows."""


class ProviderUnavailable(RunError):
    """Raised when an execution provider was asked for by name and cannot be used on this machine."""


class CapacityError(RunError):
    """Raised when adapters need more memory than a budget has, and those that hold it are pinned or running."""


class CompositionError(RunError):
    """Raised when a weighted set of adapters has no exact sum."""


class QueueFull(RunError):
    """Raised when a request would wait behind more rows than the queue takes."""


class DeadlineExceeded(RunError):
    """Raised when a request's time is over while it waits or runs."""


class ServerError(TpeftError):
    """A request that the server does not answer, or answers with a refusal."""


class ProtocolError(ServerError):
    """Raised when a request's framing, JSON or fields are not what the protocol says."""


class TooLarge(ServerError):
    """Raised when a body, tensor, header or name is beyond a limit, before memory is taken for it."""


class Unauthenticated(ServerError):
    """Raised when a request has no key, or one that is unknown, expired or revoked."""


class Forbidden(ServerError):
    """Raised when a key is valid and its role does not allow the request."""


class NotFound(ServerError):
    """Raised when nothing of a name exists, or nothing that the key may see."""


class Conflict(ServerError):
    """Raised when a name is taken, or what it names is in a state that does not allow the change."""


class QuotaExceeded(ServerError):
    """Raised when a tenant has used up what it is allowed.

    Args:
        doing, problem, expected, got, fix: as for `TpeftError`.
        retry_after: seconds after which the same request may be allowed; None: not before something is deleted.
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
    """Raised when the server's disk has no room for a change; nothing of it is kept."""


class Unavailable(ServerError):
    """Raised while the server is starting or draining."""

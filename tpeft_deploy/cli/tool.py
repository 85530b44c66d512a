"""The classes of commands: --debug and --quiet, errors on one line, and silence of other libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import click

from tpeft_deploy.errors import TpeftError, brief

__all__ = ["Command", "Group", "Tool", "is_quiet", "note"]

_DEBUG, _QUIET = "tpeft_deploy.debug", "tpeft_deploy.quiet"
_SHOW = warnings.showwarning

# What these libraries print by handlers or native code that no filter of Python's warnings reaches.
_SILENCED = {
    "DIFFUSERS_VERBOSITY": "error",
    "GRPC_VERBOSITY": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def is_quiet() -> bool:
    """Return whether the current command was given --quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().meta.get(_QUIET))


def note(text: str) -> None:
    """Print a remark to stderr, unless --quiet is given."""
    if not is_quiet():
        click.echo(text, err=True)


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    key = _DEBUG if parameter.name == "debug" else _QUIET
    context.find_root().meta[key] = True
    if key == _DEBUG:
        warnings.showwarning = _SHOW


def _options() -> list[click.Parameter]:
    return [
        click.Option(["--quiet", "-q"], is_flag=True, expose_value=False, callback=_remember, is_eager=True,
                     help="Print no progress and no remarks."),
        click.Option(["--debug"], is_flag=True, expose_value=False, callback=_remember, is_eager=True,
                     help="Show tracebacks of errors, and warnings of other libraries."),
    ]  # fmt: skip


class Command(click.Command):
    """A command that takes --quiet and --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _options()


class Group(click.Group):
    """A group of commands that take --quiet and --debug."""

    command_class = Command


class Tool(Group):
    """The top-level group, which turns errors into a line on stderr and an exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _options()

    def main(self, args: Any = None, *more: Any, **keywords: Any) -> Any:
        """Run the tool; without `args`, on the arguments of the process, in which other libraries are silenced."""
        if args is None:
            _silence_others()
        return super().main(args, *more, **keywords)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; errors other than click's are shown as one line unless --debug is given."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # click handles these; a closed pipe (| head) is not a failure
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise _Failure(error) from error


class _Failure(click.ClickException):
    def __init__(self, error: Exception) -> None:
        if isinstance(error, TpeftError):
            super().__init__(str(error))
            return
        text = brief(error, 400)
        super().__init__(f"unexpected {type(error).__name__}: {text}. Run again with --debug, and please report it.")


def _silence_others() -> None:
    """Leave stdout and stderr of the process to this package; whatever the user has set in the environment holds."""
    for name, value in _SILENCED.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.showwarning = _show_nothing  # not a filter: the server's log takes warnings in another way
    last = logging.StreamHandler()
    last.setLevel(logging.WARNING)
    last.addFilter(logging.Filter("tpeft_deploy"))
    logging.lastResort = last  # used where no handler is set up, as the server's is


def _show_nothing(*_args: object, **_keywords: object) -> None:
    pass

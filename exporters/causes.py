"""The cause of a failed trace: torch's and onnxscript's exceptions wrap it, and quote whole graphs."""

from __future__ import annotations

import linecache
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx_ir
import onnxscript
import torch

import tpeft_deploy
from tpeft_deploy.errors import brief

__all__ = ["Cause", "cause_of", "said_by"]

_ALONE = "Run torch.export.export on the module alone to see all of it; sizes that must vary need dynamic_shapes."
_REPLACE = "Compute it with operators that ONNX has, or leave that part of the model out of the export."
_WRAPPERS = ("torch.onnx", "onnxscript")
_NO_CAUSE = "Suggested fixes not found"  # torch's own search, which fails beside the cause
_LIBRARIES = tuple(Path(str(module.__file__)).parent for module in (torch, onnxscript, onnx_ir, tpeft_deploy))
_STANDARD = Path(sysconfig.get_paths()["stdlib"])


class Cause(NamedTuple):
    """Reason that a module cannot be exported, and the fix."""

    problem: str
    fix: str


def cause_of(error: BaseException) -> Cause:
    """The cause of an exporter's exception: a known pattern in its chain, else the message of the innermost library."""
    chain = [link for link in _chain(error) if not str(link).startswith(_NO_CAUSE)]
    texts = [str(link) for link in chain]
    for pattern, explain in _KNOWN:
        found = next(filter(None, map(pattern.search, texts)), None)
        if found is not None:
            return explain(found, next(filter(None, map(place_of, reversed(chain))), ""))
    own = [link for link in chain if not type(link).__module__.startswith(_WRAPPERS)]
    return Cause(f"the torch exporter failed ({said_by((own or chain)[0])})", _ALONE)


def said_by(error: BaseException) -> str:
    """An exception's class and first sentences on one line, and where in the user's code it was raised."""
    text = str(error).split("\n\n", 1)[0]
    return f"{type(error).__name__}: {brief(text)}{place_of(error)}" if text.strip() else type(error).__name__


def place_of(error: BaseException) -> str:
    """` at file.py:12, code`: the last line outside of torch and this package that an exception passed; or nothing."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if _is_users(Path(file)):
            code = brief(linecache.getline(file, line), 80)
            place = f" at {Path(file).name}:{line}" + (f", {code!r}" if code else "")
        trace = trace.tb_next
    return place


def _is_users(file: Path) -> bool:
    """Whether a file is code of the user or of a model library, which the user can read and change."""
    if any(file.is_relative_to(library) for library in _LIBRARIES) or not file.is_file():
        return False
    return "site-packages" in file.parts or not file.is_relative_to(_STANDARD)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _no_function(found: re.Match[str], place: str) -> Cause:
    return Cause(f"operator {found[1]} has no ONNX function", _REPLACE)


def _no_fake(found: re.Match[str], place: str) -> Cause:
    problem = f"the custom operator {found[1]} cannot be traced, as it has no fake implementation"
    return Cause(problem, f"It has no ONNX function either. {_REPLACE}")


def _static(found: re.Match[str], place: str) -> Cause:
    keys = re.findall(r"\['?([^'\]]+)'?\]", found["input"])
    name, axis, size = ".".join(keys), found["axis"], found["size"]
    return Cause(
        f"dynamic_shapes makes axis {axis} of input {name!r} dynamic, and forward accepts only the size {size} of the"
        " example there: it branches on that size, or uses it as a constant",
        f"Write forward for any size ({name}.shape[{axis}] in place of a number, no branch on it), or leave axis {axis}"
        f" of {name!r} out of dynamic_shapes.",
    )


def _guarded(found: re.Match[str], place: str) -> Cause:
    name = ".".join(re.findall(r"\['?([^'\]]+)'?\]", found["input"]))
    return Cause(
        f"forward does not accept every size of axis {found['axis']} of input {name!r}, which dynamic_shapes makes"
        f" dynamic: {brief(found['why'], 120)}",
        "Give a range, torch.export.Dim(name, min=, max=), or leave the axis out of dynamic_shapes.",
    )


def _data_dependent(found: re.Match[str], place: str) -> Cause:
    return Cause(
        f"forward chooses by the values of a tensor{place}, which a traced graph cannot (data-dependent control flow)",
        "Compute both results and choose with torch.where, or take the choice out of forward.",
    )


_INPUT = r"(?P<input>(?:\['?[^'\]]+'?\])+)"
_KNOWN: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], Cause]], ...] = (
    (re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'"), _no_function),
    (re.compile(r"No ONNX function found for ([\w.:<>]+)"), _no_function),
    (re.compile(r"no fake impl registered for <CustomOpDef\(([^)]+)\)>"), _no_fake),
    (re.compile(r"No fake impl(?:ementation)?.*? for ([\w.:]+)"), _no_fake),
    (
        re.compile(rf"inferred a static shape of (?P<size>\d+) for dimension inputs{_INPUT}\.shape\[(?P<axis>\d+)\]"),
        _static,
    ),
    (
        re.compile(
            rf"values of \S+ = L{_INPUT}\.size\(\)\[(?P<axis>\d+)\] .*?inferred to be a constant \((?P<size>\d+)\)",
            re.DOTALL,
        ),
        _static,
    ),
    (
        re.compile(
            rf"values of \S+ = L{_INPUT}\.size\(\)\[(?P<axis>\d+)\] .*? satisfy the generated guard (?P<why>[^\n]+)"
        ),
        _guarded,
    ),
    (re.compile(r"[Dd]ata-dependent (?:expression|branching|control flow)"), _data_dependent),
)

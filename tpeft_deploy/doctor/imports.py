"""Whether what is installed can be imported."""

from __future__ import annotations

from tpeft_deploy.doctor.child import ask
from tpeft_deploy.doctor.extras import Extra, modules
from tpeft_deploy.doctor.findings import Defect

__all__ = ["broken_imports", "import_failures"]

_PROBE = "tpeft_deploy.doctor.probe_imports"


def broken_imports(extras: list[Extra]) -> list[Defect]:
    """Import a module of each installed distribution; a crash of one does not hide the next."""
    distributions = modules(extras)
    return [
        Defect(
            f"{distributions[name]} is installed and cannot be imported: {error}",
            f"pip install --force-reinstall {distributions[name]}.",
        )
        for name, error in import_failures(list(distributions)).items()
    ]


def import_failures(names: list[str]) -> dict[str, str]:
    """Import modules in child processes; return why those that fail do."""
    left, failures = names, dict[str, str]()
    while left:
        answer = ask(_PROBE, *left)
        failed = {line["module"]: line["error"] for line in answer.lines if "module" in line}
        begun = [line["begin"] for line in answer.lines if "begin" in line]
        if answer.failure is not None:
            culprit = begun[-1] if begun and begun[-1] not in failed else left[0]
            failed[culprit] = failed.get(culprit) or answer.failure
        failures |= {name: error for name, error in failed.items() if error is not None}
        left = [name for name in left if name not in failed] if answer.failure is not None else []
    return failures

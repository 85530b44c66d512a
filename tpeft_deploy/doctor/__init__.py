"""Examination of an installation: extras, ONNX Runtime's providers, the GPU, and what is broken.

Whatever may crash or hang runs in child processes; this one loads the metadata of packages alone.
"""

from __future__ import annotations

import platform
from pathlib import Path

from tpeft_deploy.doctor.cuda import examine_cuda
from tpeft_deploy.doctor.extras import EXTRAS, NAME, Extra, examine_extras
from tpeft_deploy.doctor.findings import Defect, Findings
from tpeft_deploy.doctor.imports import broken_imports
from tpeft_deploy.doctor.providers import examine_providers
from tpeft_deploy.installed import onnx_runtimes, overwriting
from tpeft_deploy.progress import Progress, silent
from tpeft_deploy.version import __version__

__all__ = ["Findings", "Defect", "examine"]


def examine(progress: Progress = silent) -> Findings:
    """Examine the installation of this package that runs.

    Args:
        progress: callback that gets each stage.
    """
    progress("compare versions")
    versions = {NAME: __version__, "python": platform.python_version(), "platform": platform.platform()}
    found = Findings(versions, str(Path(__file__).parents[1]), examine_extras(), onnx_runtimes())
    found.problems += [problem for extra in found.extras for problem in _of_extra(extra)]
    mixed = _of_builds()
    found.problems += mixed
    progress("import what is installed")
    found.problems += broken_imports(found.extras)
    progress("look for a GPU")
    found.driver, found.libraries = examine_cuda(found.runtimes)
    progress("run a session on each provider")
    found.providers, problems = examine_providers(found)
    found.problems += [] if mixed else problems  # which are those of the mixture
    return found


def _of_extra(extra: Extra) -> list[Defect]:
    what = f"extra {extra.name}" if extra.name else NAME
    problems = [Defect(f"{what}: {text}", f"{extra.install}.") for text in extra.outdated]
    if not extra.name:
        problems += [Defect(f"{what}: {name} is not installed", f"{extra.install}.") for name in extra.missing]
    return problems


def _of_builds() -> list[Defect]:
    mixed = overwriting()
    if len(mixed) < 2:
        return []
    wanted = f"'tpeft-deploy[{EXTRAS[mixed[-1]]}]'"
    fix = f"pip uninstall --yes {' '.join(mixed)} && pip install {wanted}, or another one of them alone."
    return [Defect(f"{' and '.join(mixed)} are both installed, and overwrite each other's files", fix)]

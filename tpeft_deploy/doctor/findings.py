"""What `tpeft-deploy doctor` found, and its JSON document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tpeft_deploy.doctor.extras import Extra

__all__ = ["Findings", "Defect"]


@dataclass(frozen=True)
class Defect:
    """Something that is installed and does not work.

    Args:
        what: description of it, as a line.
        fix: remedy, as a sentence.
    """

    what: str
    fix: str


@dataclass
class Findings:
    """The state of an installation.

    Args:
        versions: name -> version, of the package and of what every installation has.
        path: directory of the package.
        extras: each extra.
        runtimes: installed builds of ONNX Runtime, with their versions.
        providers: for each execution provider `provider`, `built`, `works` and `reason`.
        driver: `cuda`, `version`, `devices` and `reason`, of NVIDIA's driver.
        libraries: for each library of CUDA that the build needs `library`, `path`, `version` and `error`.
        problems: defects of what is installed.
    """

    versions: dict[str, str]
    path: str
    extras: list[Extra] = field(default_factory=list)
    runtimes: dict[str, str] = field(default_factory=dict)
    providers: list[dict[str, Any]] = field(default_factory=list)
    driver: dict[str, Any] = field(default_factory=dict)
    libraries: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Defect] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the document that --json prints."""
        return {
            "versions": self.versions,
            "path": self.path,
            "extras": [
                {
                    "extra": extra.name,
                    "state": extra.state,
                    "missing": list(extra.missing),
                    "outdated": list(extra.outdated),
                    "install": extra.install,
                }
                for extra in self.extras
            ],
            "onnxruntime": self.runtimes,
            "providers": self.providers,
            "driver": self.driver,
            "libraries": self.libraries,
            "problems": [{"what": problem.what, "fix": problem.fix} for problem in self.problems],
        }

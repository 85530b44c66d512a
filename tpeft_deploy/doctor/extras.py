"""The optional extras: which are complete, and what the others lack, by the metadata of installed distributions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement

from tpeft_deploy.installed import onnx_runtimes

__all__ = ["EXTRAS", "NAME", "Extra", "examine_extras", "modules"]

NAME = "tpeft-deploy"
# Build of ONNX Runtime -> extra that installs it; there must be one alone.
EXTRAS = {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu", "onnxruntime-openvino": "openvino"}
_NOT_FOR_USERS = {"dev"}

# Distributions with another name than their module.
_MODULES = {
    "google-re2": "re2",
    "grpcio": "grpc",
    "opentelemetry-api": "opentelemetry.trace",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "scikit-learn": "sklearn",
}
_TRIED_OTHERWISE = ("onnxruntime", "nvidia-")


@dataclass(frozen=True)
class Extra:
    """An extra; the one without a name is the package without any.

    Args:
        name: name as in `pip install 'tpeft-deploy[NAME]'`.
        present: distributions that are installed in a version that fits.
        missing: distributions that are not installed.
        outdated: distributions of another version, as "torch 2.3.0, needs >=2.11".
        instead: distributions to uninstall first, as both would overwrite each other.
    """

    name: str
    present: tuple[str, ...]
    missing: tuple[str, ...]
    outdated: tuple[str, ...]
    instead: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """The word for it: complete, incomplete, wrong version, or not installed."""
        if self.outdated:
            return "wrong version"
        if not self.missing:
            return "complete"
        return "incomplete" if self.present else "not installed"

    @property
    def install(self) -> str | None:
        """The command that completes it; None where nothing is to be done."""
        if self.state == "complete":
            return None
        first = f"pip uninstall --yes {' '.join(self.instead)} && " if self.instead else ""
        what = f"{NAME}[{self.name}]" if self.name else NAME
        return f"{first}pip install {'--upgrade ' if self.outdated else ''}'{what}'"


def examine_extras() -> list[Extra]:
    """Compare the requirements of each extra with what is installed; empty if this package has no metadata."""
    try:
        own = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return []
    names = [name for name in own.metadata.get_all("Provides-Extra") or [] if name not in _NOT_FOR_USERS]
    return [_examine(name) for name in ("", *sorted(names))]


def modules(extras: list[Extra]) -> dict[str, str]:
    """Return the modules to import for the distributions that are present, with the name of each distribution.

    ONNX Runtime and NVIDIA's libraries are not among them: they are tried as providers.
    """
    present = dict.fromkeys(name for extra in extras for name in extra.present)
    named = [(_module(name), name) for name in present if not name.startswith(_TRIED_OTHERWISE)]
    return {module: name for module, name in named if module is not None}


def _module(distribution: str) -> str | None:
    """Name of a module of a distribution; None if it has none, as one with programs alone."""
    usual = distribution.replace("-", "_")
    if distribution in _MODULES or find_spec(usual) is not None:
        return _MODULES.get(distribution, usual)
    files = [file for file in metadata.files(distribution) or () if file.suffix in (".py", ".so", ".pyd")]
    packages = sorted((len(file.parts), ".".join(file.parent.parts)) for file in files if file.name == "__init__.py")
    return packages[0][1] if packages else usual if files else None


def _examine(extra: str) -> Extra:
    present, missing, outdated = [], [], []
    for wanted in _requirements(NAME, extra):
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            missing.append(wanted.name)
            continue
        if wanted.specifier.contains(version, prereleases=True):
            present.append(wanted.name)
        else:
            outdated.append(f"{wanted.name} {version}, needs {wanted.specifier}")
    others = tuple(name for name in onnx_runtimes() if EXTRAS[name] != extra) if extra in EXTRAS.values() else ()
    return Extra(extra, tuple(present), tuple(missing), tuple(outdated), others)


def _requirements(distribution: str, extra: str) -> Iterator[Requirement]:
    """Requirements of a distribution's extra, without those that it has anyway, and those of their own extras."""
    for line in metadata.requires(distribution) or []:
        wanted = Requirement(line)
        asked = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if not asked or (extra and always):
            continue
        yield wanted
        for inner in sorted(wanted.extras):
            try:
                yield from _requirements(wanted.name, inner)
            except metadata.PackageNotFoundError:
                break  # the distribution itself is missing

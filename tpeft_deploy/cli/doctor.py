"""`doctor`: what is installed, what of it works, and what to do about the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.console import emit, json_option
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command
from tpeft_deploy.errors import TpeftError

if TYPE_CHECKING:
    from tpeft_deploy.doctor import Findings

__all__ = ["doctor"]


@click.command(cls=Command)
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation: extras, execution providers, GPU, and the versions of what they need.

    Every installed package is imported and a session runs on every provider, in child processes. The exit code is 1
    if something that is installed does not work; what is not installed is no failure.
    """
    from tpeft_deploy.doctor import examine

    with stages() as begin:
        found = examine(begin)
    if as_json:
        emit(found.to_json(), key="extras", columns=[], as_json=True)
    else:
        _print(found)
    if found.problems:
        first, *others = found.problems
        raise TpeftError(
            "check the installation",
            problem="; ".join([first.what, *(problem.what for problem in others)]),
            fix=" ".join(dict.fromkeys(problem.fix for problem in found.problems)),
        )


def _print(found: Findings) -> None:
    runtimes = [f"{name} {version}" for name, version in found.runtimes.items()]
    click.echo(", ".join([*(f"{name} {version}" for name, version in found.versions.items()), *runtimes]))
    click.echo(f"installed in {found.path}\n")
    extras = [
        {
            "extra": extra.name or "(none)",
            "state": extra.state,
            "lacks": _some([*extra.outdated, *extra.missing]),
            "install": extra.install,
        }
        for extra in found.extras
    ]
    if extras:
        emit({"extras": extras}, key="extras", columns=["extra", "state", "lacks", "install"], as_json=False)
    else:
        click.echo("extras: unknown, as this is a checkout that is not installed")
    click.echo()
    providers = [{**own, "state": _state(own)} for own in found.providers]
    emit({"providers": providers}, key="providers", columns=["provider", "state", "reason"], as_json=False)
    click.echo()
    for line in _gpu(found.driver):
        click.echo(line)
    if found.libraries:
        libraries = [{**own, "place": own["error"] or own["path"] or "found by the loader"} for own in found.libraries]
        emit({"libraries": libraries}, key="libraries", columns=["library", "version", "place"], as_json=False)


def _some(names: list[str]) -> str:
    return ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]) or "-"


def _state(provider: dict[str, Any]) -> str:
    if provider["works"]:
        return "works"
    return "fails" if provider["built"] else "absent"


def _gpu(driver: dict[str, Any]) -> list[str]:
    if driver["reason"] is not None:
        return [f"GPU: none that can be used: {driver['reason']}"]
    version = driver["version"] or "of unknown version"
    return [
        *(f"GPU {index}: {own['name']}, {own['bytes'] / 2**30:.1f} GiB" for index, own in enumerate(driver["devices"])),
        f"driver {version}, for CUDA up to {driver['cuda'] or 'an unknown version'}",
    ]

"""Measurements of `verify` on a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import COMPONENTS, Bundle
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.proof.per_target import TargetCheck

__all__ = ["Verification", "joint"]


@dataclass(frozen=True, eq=False)
class Verification:
    """Measurements on a bundle with correct digests.

    Args:
        bundle: the verified bundle.
        reference: description of the reference.
        tasks: the tasks that were checked -> adapter.
        checks: every form of every task, rows of different tasks, and rows filled up to one length.
        targets: each target alone, when a report was asked for.
        left_out: pairs of what was not checked and the reason.
    """

    bundle: Bundle
    reference: str
    tasks: Mapping[str, Adapter]
    checks: tuple[Check, ...]
    targets: tuple[TargetCheck, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def failed(self) -> list[Check]:
        """The checks that failed, those of single targets last."""
        return [check for check in [*self.checks, *(t.check for t in self.targets)] if check.failure is not None]

    def passed(self) -> Verification:
        """The verification itself.

        Raises:
            NotEquivalent: the first check that failed.
        """
        for check in self.failed:
            check.passed()
        return self

    def to_json(self) -> dict[str, Any]:
        """Document that --json prints."""
        parts = self.bundle.components
        manifests = [part.manifest for part in parts.values()]
        inside = f"{COMPONENTS}/{{}}/{{}}" if self.bundle.parts else "{1}"
        return {
            "name": self.bundle.manifest.name,
            "base_digest": self.bundle.base_digest,
            "reference": self.reference,
            "rows": "group" if any(manifest.rows == "group" for manifest in manifests) else "each",
            "tolerance": max((m.tolerance for m in manifests if m.tolerance is not None), default=None),
            "tasks": {task: self.bundle.digest(task) for task in self.tasks},
            "files": [inside.format(name, file) for name, part in parts.items() for file in part.manifest.files],
            "checks": [check.to_json() for check in self.checks],
            "targets": [target.to_json() for target in self.targets],
            "left_out": [{"what": what, "reason": reason} for what, reason in self.left_out],
        }


def joint(bundle: Bundle, found: Mapping[str, Verification]) -> Verification:
    """Join the measurements of a bundle's components; the name of the component stands before each form."""
    return Verification(
        bundle,
        next(iter(found.values())).reference,
        {task: adapter for own in found.values() for task, adapter in own.tasks.items()},
        tuple(replace(check, form=f"{name} {check.form}") for name, own in found.items() for check in own.checks),
        tuple(target for own in found.values() for target in own.targets),
        tuple((f"{name}: {what}", reason) for name, own in found.items() for what, reason in own.left_out),
    )

"""Measurements of `verify` on a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.proof.per_target import TargetCheck

__all__ = ["Verification"]


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
        manifest = self.bundle.manifest
        return {
            "name": manifest.name,
            "base_digest": manifest.base_digest,
            "reference": self.reference,
            "rows": manifest.rows,
            "tolerance": manifest.tolerance,
            "tasks": {task: self.bundle.digest(task) for task in self.tasks},
            "files": list(manifest.files),
            "checks": [check.to_json() for check in self.checks],
            "targets": [target.to_json() for target in self.targets],
            "left_out": [{"what": what, "reason": reason} for what, reason in self.left_out],
        }

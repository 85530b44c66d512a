"""Comparing a provider that is not exact by construction with its reference, before anything is served."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tpeft_deploy.errors import ProviderUnavailable, RunError
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.engine import translated
from tpeft_deploy.runtime.folding import compare
from tpeft_deploy.runtime.replica import Replica
from tpeft_deploy.runtime.sessions.banked import Session

__all__ = ["check_provider"]


def check_provider(replica: Replica, versions: Sequence[Version]) -> None:
    """Compare the answers of a replica to the bundle's example with those of the provider's reference, if it has one.

    Args:
        replica: sessions on one device.
        versions: versions to compare, the base in front; where the bank does not answer, only the base is.

    Raises:
        ProviderUnavailable: the answers differ, or the base cannot be opened.
        AdapterError, BundleError, CapacityError: a version cannot be brought to the device.
    """
    execution, manifest = replica.sessions.choice.execution, replica.files.bundle.manifest
    if replica.only_folded:
        try:
            replica.folds.begin(versions[0]).result()  # compared with the bank, which is on the reference
        except RunError as error:
            raise ProviderUnavailable(
                f"open bundle {manifest.name!r} on {execution.label}", problem=str(error)
            ) from error
    elif execution.reference and isinstance(replica.session, Session):
        banked = replica.files.bundle.check_file(replica.files.graphs.banked)
        reference = Session(banked, replica.sessions.reference)
        for version in replica.own(versions):
            _compare(replica, replica.session, reference, version)


def _compare(replica: Replica, session: Session, reference: Session, version: Version) -> None:
    bundle = replica.files.bundle
    inputs, limit = bundle.example(), compare.limit_of(bundle.manifest)
    with replica.residency.acquire([version]), translated(bundle.manifest.name):
        bank, rows = replica.residency.rows([version], replica.name)
        index = np.array(rows, np.int64)
        found = session.run(bank, inputs, index)
        # Bindings belong to a session.
        error = compare.agree(found, reference.run(replace(bank, bindings=deque()), inputs, index))
    if not error <= limit:
        raise ProviderUnavailable(
            f"open bundle {bundle.manifest.name!r} on {replica.sessions.choice.execution.label}",
            expected=f"the example's answer for {version.name!r} with a relative error up to {limit:g}",
            got=f"one of {error:.2e}",
            fix=f"Use {replica.sessions.reference.choice.provider!r}, and please report the model.",
        )

"""Registry: keys, tenants, tasks with their versions, and the audit log.

A directory holds the database (SQLite unless a URL names another) and the adapters' files, named by the SHA-256 of
their content.  Changes are durable once they are acknowledged and invisible before.
"""

from tpeft_deploy.runtime.server.registry.audit import Audit, AuditRecord
from tpeft_deploy.runtime.server.registry.files.uploads import Staged
from tpeft_deploy.runtime.server.registry.keys import KeyRecord, Keys
from tpeft_deploy.runtime.server.registry.placements import PinRecord, Placements
from tpeft_deploy.runtime.server.registry.snapshot import (
    ALWAYS,
    CURRENT,
    AliasRecord,
    Condition,
    RegistrySnapshot,
    TaskRecord,
    VersionRecord,
)
from tpeft_deploy.runtime.server.registry.state import POLL_SECONDS, State, open_keys, open_state
from tpeft_deploy.runtime.server.registry.task_store import Tasks
from tpeft_deploy.runtime.server.registry.tenants import TenantRecord, Tenants

__all__ = [
    "ALWAYS",
    "AliasRecord",
    "Audit",
    "AuditRecord",
    "CURRENT",
    "Condition",
    "KeyRecord",
    "Keys",
    "POLL_SECONDS",
    "PinRecord",
    "Placements",
    "RegistrySnapshot",
    "Staged",
    "State",
    "TaskRecord",
    "Tasks",
    "TenantRecord",
    "Tenants",
    "VersionRecord",
    "open_keys",
    "open_state",
]

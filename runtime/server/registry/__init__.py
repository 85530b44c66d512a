"""What is kept: keys, tenants, tasks and their versions, and who changed what.

A directory holds the database (SQLite unless a URL names another) and the adapters' files, named by the SHA-256 of
their content.  What was acknowledged is there after a crash, and what was not is not seen.
"""

from tpeft_deploy.runtime.server.registry.audit import Audit, AuditRecord
from tpeft_deploy.runtime.server.registry.files.uploads import Staged
from tpeft_deploy.runtime.server.registry.keys import KeyRecord, Keys
from tpeft_deploy.runtime.server.registry.placements import PinRecord, Placements
from tpeft_deploy.runtime.server.registry.snapshot import CURRENT, AliasRecord, Catalog, TaskRecord, VersionRecord
from tpeft_deploy.runtime.server.registry.state import State, open_keys, open_state
from tpeft_deploy.runtime.server.registry.task_store import Tasks
from tpeft_deploy.runtime.server.registry.tenants import TenantRecord, Tenants

__all__ = [
    "AliasRecord",
    "Audit",
    "AuditRecord",
    "CURRENT",
    "Catalog",
    "KeyRecord",
    "Keys",
    "PinRecord",
    "Placements",
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

"""Number the changes of tasks, so that servers which share a database read only what has changed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the number of a task's last change, and the counter."""
    op.add_column("tasks", sa.Column("changed", sa.Integer, nullable=False, server_default="0"))
    op.create_index("ix_tasks_changed", "tasks", ["changed"])
    op.execute("INSERT INTO meta (name, value) VALUES ('tasks', 0)")

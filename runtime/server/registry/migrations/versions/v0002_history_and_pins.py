"""Add the history of aliases, pins and unloaded models."""

from alembic import op
from sqlalchemy import Boolean, Column, Float, ForeignKey, Integer, String

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the three tables; none of them has rows for what happened before."""
    name = String(128)
    op.create_table(
        "alias_history",
        Column("id", Integer, primary_key=True, autoincrement=True),
        Column("task", Integer, ForeignKey("tasks.id"), nullable=False),
        Column("alias", name, nullable=False),
        Column("number", Integer, nullable=False),
        Column("time", Float),
        Column("by", name),
    )
    op.create_index("alias_history_of", "alias_history", ["task", "alias", "id"])
    op.create_table(
        "pins",
        Column("tenant", name, primary_key=True),
        Column("task", name, primary_key=True),
        Column("version", String(10), primary_key=True),
        Column("folded", Boolean, nullable=False),
        Column("time", Float, nullable=False),
        Column("by", name, nullable=False),
    )
    op.create_table(
        "unloaded",
        Column("tenant", name, primary_key=True),
        Column("task", name, primary_key=True),
        Column("time", Float, nullable=False),
        Column("by", name, nullable=False),
    )

"""Let servers that share a database hold shares of the tenants' rates."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the leases of servers."""
    op.create_table(
        "leases",
        sa.Column("server", sa.String(32), primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
    )

"""Let quotas have tokens per minute: no table changes, but earlier servers cannot read such a quota."""

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Change nothing."""

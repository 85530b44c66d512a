"""Tables of the first servers, which created them without migrations: the start of all upgrades."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Do nothing: every earlier database has these tables."""

"""The guard's decisions have one name everywhere: a verdict is what a window, a gate or a canary gets."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Rename the column; what it holds stays."""
    op.execute("ALTER TABLE exchanges RENAME COLUMN verdicts TO decisions")

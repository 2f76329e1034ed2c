"""When old events were last deleted, so that a clock that has jumped is noticed before the next time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table."""
    op.create_table("prunings", sa.Column("pruned_at", sa.Double, nullable=False))

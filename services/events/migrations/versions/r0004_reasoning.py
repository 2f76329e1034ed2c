"""What a model thought before it answered, which a row made from the answer is to have."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column, empty for the events that are there."""
    op.add_column("exchanges", sa.Column("reasoning", sa.Text))

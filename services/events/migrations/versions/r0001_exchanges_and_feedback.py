"""Exchanges and the feedback on them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "exchanges",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("user", sa.Text),
        sa.Column("session", sa.Text),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("shadow_of", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("messages", sa.Text, nullable=False),
        sa.Column("parameters", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("answer", sa.Text),
        sa.Column("finish_reason", sa.Text),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("queue_s", sa.Double, nullable=False),
        sa.Column("first_token_s", sa.Double),
        sa.Column("total_s", sa.Double, nullable=False),
        sa.Column("verdicts", sa.Text, nullable=False),
        sa.Column("valid_output", sa.Boolean),
        sa.Column("mean_logprob", sa.Double),
    )
    op.create_index("exchanges_by_time", "exchanges", ["received_at", "request_id"])
    op.create_table(
        "feedback",
        sa.Column("feedback_id", sa.Text, primary_key=True),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("given_at", sa.Double, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("thumb", sa.Integer),
        sa.Column("correction", sa.Text),
        sa.Column("comment", sa.Text),
        sa.CheckConstraint("thumb IN (1, -1)", name="thumb_is_up_or_down"),
    )
    op.create_index("feedback_by_time", "feedback", ["given_at", "feedback_id"])
    op.create_index("feedback_by_request", "feedback", ["request_id"])

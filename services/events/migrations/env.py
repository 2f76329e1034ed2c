"""What Alembic runs: the steps, on the connection and in the transaction that `migrate` opened."""

from __future__ import annotations

from alembic import context

# Alembic takes SQLite's tables for outside of transactions; they are not.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()

"""Alembic's entry point: run the steps on the connection, and in the transaction, of `migrate`."""

from __future__ import annotations

from alembic import context

if hasattr(context, "config"):  # only while Alembic runs this file; imported by others, it does nothing
    # Alembic assumes that SQLite has no transactional DDL; it does.
    context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()

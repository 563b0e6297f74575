"""Run by alembic: applies migrations in the transaction of the connection that `database` hands it."""

from alembic import context

from choral_server.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()

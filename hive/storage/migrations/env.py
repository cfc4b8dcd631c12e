"""Run by Alembic, on the connection that hive/storage/tables.py gives it."""

from alembic import context

from hive.storage.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes a table by making it anew
)
with context.begin_transaction():
    context.run_migrations()

"""The tables are what the migrations make of an empty database."""

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from hive.storage.catalogue import opened
from hive.storage.tables import metadata
from tests.patience import awaited, short_directory


def differences(connection: Connection) -> list[Any]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


@awaited
async def test_migrations_make_the_tables_as_they_are_declared() -> None:
    with short_directory() as home:
        async with opened(home) as catalogue, catalogue._engine.begin() as connection:
            assert await connection.run_sync(differences) == []

"""The tables are what the migrations make of an empty database."""

import itertools
import json
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from hive.storage.catalogue import opened
from hive.storage.tables import metadata
from tests.patience import awaited, short_directory
from tests.postgres import Server

_number = itertools.count()


def differences(connection: Connection) -> list[Any]:
    # PostgreSQL's has one table more, which says whose the database is.
    names = {"include_name": lambda name, kind, _: kind != "table" or name != "keeper"}
    return list(compare_metadata(MigrationContext.configure(connection, opts=names), metadata))


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def url(request: pytest.FixtureRequest) -> str:
    """Of a database that nobody has used yet."""
    if request.param == "SQLite":
        return ""
    server: Server = request.getfixturevalue("postgres")
    return server.make_database(f"tables{next(_number)}")


@awaited
async def test_migrations_make_the_tables_as_they_are_declared(url: str) -> None:
    with short_directory() as home:
        async with opened(home, url) as catalogue, catalogue._engine.begin() as connection:
            assert await connection.run_sync(differences) == []


def moved(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "hive.storage:migrations")
    config.attributes["connection"] = connection
    (command.upgrade if revision == "head" else command.downgrade)(config, revision)


@awaited
async def test_what_an_older_hive_has_written_is_kept(url: str) -> None:
    """From the first tables on: JSON's null was no conversation there."""
    said = json.dumps({"kind": "chat", "body": {"messages": []}})
    with short_directory() as home:
        async with opened(home, url) as it, it._engine.begin() as connection:
            await connection.run_sync(moved, "0001")
            row = "INSERT INTO sessions VALUES ('{}', 'ada', 'm', 'ACTIVE', 's', 1.0, 2.0, '{}', NULL)"
            await connection.exec_driver_sql(row.format("old", "null"))
            await connection.exec_driver_sql(row.format("new", said))
            await connection.exec_driver_sql(
                "INSERT INTO windows (id, owner, name, state, session_id, model, salt, created_at,"
                " tokens, blocks, bytes, description, tags, identity, conversation) VALUES ('1',"
                " 'ada', 'w', 'FROZEN', 'old', 'm', 's', 3.0, 16, 1, 4096, '', '[\"a\"]', '{}', '{}')"
            )
        async with opened(home, url) as it:
            assert await it.conversation("old", "ada") is None
            assert await it.conversation("new", "ada") == json.loads(said)
            kept = {one.id: one.has_conversation for one in await it.sessions("ada")}
            assert kept == {"old": False, "new": True}
            (window,) = await it.named("w", "ada")
            assert (window.tags, window.bytes, window.created_at) == (("a",), 4096, 3.0)

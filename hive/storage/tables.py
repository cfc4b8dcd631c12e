"""The catalogue's tables. What changes here needs a migration; a test compares the two."""

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

from hive.errors import ConfigInvalid

CONNECTIONS = 4  # readers do not wait for the one that writes; of SQLite each has a thread

# Names of constraints are part of the schema: migrations refer to them.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# JSON and not PostgreSQL's JSONB: what was said is kept as it was said, a NUL and half a surrogate
# pair too.
# An owner is the name of an API key; empty where hive has no keys. Times are seconds since 1970.
windows = Table(
    "windows",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    Column("session_id", String(64), nullable=False),
    Column("model", String(256), nullable=False),
    Column("salt", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("blocks", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("description", String(1024), nullable=False),
    Column("tags", JSON, nullable=False),
    Column("identity", JSON, nullable=False),
    Column("receipt", JSON),
    Column("parent_id", String(32)),
    UniqueConstraint("owner", "name"),
    Index(None, "name", "state"),  # of whichever owner
    # Pages of whoever may see all, and of one owner, in the order that is asked for if no other is.
    Index(None, "state", "created_at"),
    Index(None, "owner", "state", "created_at"),
    Index(None, "owner", "bytes"),  # sums are had from the index alone
    Index(None, "parent_id"),
)

# What was done once and for all, each in a row.
marks = Table("marks", metadata, Column("name", String(32), primary_key=True))

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("model", String(256), nullable=False),
    Column("state", String(16), nullable=False),
    Column("salt", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
    Column("conversation", JSON(none_as_null=True)),
    Column("window_id", String(32), ForeignKey("windows.id", ondelete="SET NULL")),
    Index(None, "owner", "used_at"),
    Index(None, "used_at"),
    Index(None, "state", "used_at"),
    Index(None, "window_id"),  # which a window's end looks for
)


def upgraded(connection: Connection) -> None:
    """Bring the tables up to date, or make them. Raises ConfigInvalid where a newer hive did."""
    config = Config()
    config.set_main_option("script_location", "hive.storage:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as exc:
        raise ConfigInvalid(
            "The catalogue was written by a newer hive.",
            action="Run that hive, or set another server.state_dir or windows.catalogue_url.",
        ) from exc

"""Sessions and windows."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "windows",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("blocks", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("description", sa.String(1024), nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("identity", sa.JSON, nullable=False),
        sa.Column("conversation", sa.JSON, nullable=False),
        sa.Column("receipt", sa.JSON),
        sa.Column("parent_id", sa.String(32)),
        sa.PrimaryKeyConstraint("id", name="pk_windows"),
        sa.UniqueConstraint("owner", "name", name="uq_windows_owner_name"),
    )
    op.create_index("ix_windows_owner_created_at", "windows", ["owner", "created_at"])
    op.create_index("ix_windows_state", "windows", ["state"])
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("used_at", sa.Float, nullable=False),
        sa.Column("conversation", sa.JSON),
        sa.Column("window_id", sa.String(32)),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.ForeignKeyConstraint(
            ["window_id"], ["windows.id"], name="fk_sessions_window_id", ondelete="SET NULL"
        ),
    )
    op.create_index("ix_sessions_owner_created_at", "sessions", ["owner", "created_at"])
    op.create_index("ix_sessions_state_used_at", "sessions", ["state", "used_at"])


def downgrade() -> None:
    op.drop_table("sessions")
    op.drop_table("windows")

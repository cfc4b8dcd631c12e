"""A window's conversation is in its manifest alone; each question has an index; marks."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NEW = {
    "windows": (
        ["name", "state"],
        ["state", "created_at"],
        ["owner", "state", "created_at"],
        ["owner", "bytes"],
        ["parent_id"],
    ),
    "sessions": (["owner", "used_at"], ["used_at"], ["window_id"]),
}
OLD = {"windows": (["owner", "created_at"], ["state"]), "sessions": (["owner", "created_at"],)}


def upgrade() -> None:
    for table, indices in OLD.items():
        for columns in indices:
            op.drop_index(_name(table, columns), table)
    op.drop_column("windows", "conversation")
    # What had none was written as JSON's null, which is not SQL's.
    op.execute(
        "UPDATE sessions SET conversation = NULL WHERE CAST(conversation AS VARCHAR) = 'null'"
    )
    for table, indices in NEW.items():
        for columns in indices:
            op.create_index(_name(table, columns), table, columns)
    op.create_table(
        "marks",
        sa.Column("name", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_marks"),
    )


def downgrade() -> None:
    op.drop_table("marks")
    for table, indices in NEW.items():
        for columns in indices:
            op.drop_index(_name(table, columns), table)
    op.add_column(
        "windows", sa.Column("conversation", sa.JSON, nullable=False, server_default="{}")
    )
    for table, indices in OLD.items():
        for columns in indices:
            op.create_index(_name(table, columns), table, columns)


def _name(table: str, columns: list[str]) -> str:
    return "_".join(("ix", table, *columns))

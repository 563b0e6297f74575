"""Members, the tokens by which they enrol, and who did what an event tells of."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables; of earlier events nobody noted who."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "members",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("signing_key", sa.LargeBinary, nullable=False),
        sa.Column("enrolled_at", moment),
        sa.Column("expires_at", moment),
        sa.Column("revoked_at", moment),
        sa.Column("reason", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_members"),
    )
    op.create_table(
        "tokens",
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("expires_at", moment, nullable=False),
        sa.Column("replace", sa.Boolean, nullable=False),
        sa.Column("used_by", sa.LargeBinary, nullable=False),
        sa.Column("void", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_tokens"),
    )
    op.add_column("events", sa.Column("by", sa.Text, nullable=False, server_default=""))

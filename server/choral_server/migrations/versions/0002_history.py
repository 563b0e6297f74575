"""The history, and what of a round it tells: the digests of its plan and of the version that it starts from."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table, and the columns: rounds from before have neither digest."""
    op.create_table(
        "history",
        sa.Column("sequence", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("before", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_history"),
    )
    for name in ("plan", "parent"):
        op.add_column("rounds", sa.Column(name, sa.LargeBinary, nullable=False, server_default=sa.text("''")))

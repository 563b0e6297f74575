"""What rounds cost in privacy."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table; until now no round had noise."""
    number, measure = sa.BigInteger, sa.Double
    op.create_table(
        "spendings",
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("round", number, nullable=False, autoincrement=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("noise", measure, nullable=False),
        sa.Column("sampling", sa.Text, nullable=False),
        sa.Column("expected", number, nullable=False),
        sa.Column("population", number, nullable=False),
        sa.Column("clip", measure, nullable=False),
        sa.Column("delta", measure, nullable=False),
        sa.Column("epsilon_models", measure, nullable=False),
        sa.Column("epsilon_coordinator", measure, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("next_clip", measure),
        sa.Column("rounds", number, nullable=False),
        sa.PrimaryKeyConstraint("run", "round", name="pk_spendings"),
        sa.ForeignKeyConstraint(["run"], ["runs.name"], name="fk_spendings_runs"),
    )

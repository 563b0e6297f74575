"""Who adds the noise of a private round."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Until now it was the coordinator."""
    op.add_column("spendings", sa.Column("mode", sa.Text, nullable=False, server_default="central"))

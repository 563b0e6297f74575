"""Who was sent away: since when it stands in line for a place, and when it is to come back."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns; until now nobody was sent away."""
    op.add_column("clients", sa.Column("waits_since", sa.DateTime(timezone=True)))
    op.add_column("clients", sa.Column("away_until", sa.DateTime(timezone=True)))

"""How each update was encoded, and in how many bytes it came."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the columns: of results from before neither is known."""
    op.add_column("assignments", sa.Column("codec", sa.Text, nullable=False, server_default=""))
    op.add_column("assignments", sa.Column("payload_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")))

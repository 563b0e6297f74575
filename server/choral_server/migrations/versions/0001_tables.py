"""Runs, rounds, assignments, versions, clients, events and leases."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "runs",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("place", sa.BigInteger, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("task_version", sa.Text, nullable=False),
        sa.Column("rounds_planned", sa.BigInteger, nullable=False),
        sa.Column("started_at", moment, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("rounds_done", sa.BigInteger, nullable=False),
        sa.Column("next_round", sa.BigInteger, nullable=False),
        sa.Column("latest", sa.BigInteger, nullable=False),
        sa.Column("has_statistics", sa.Boolean, nullable=False),
        sa.Column("paused", sa.Boolean, nullable=False),
        sa.Column("abandoned", sa.BigInteger, nullable=False),
        sa.Column("best", sa.BigInteger),
        sa.Column("best_value", sa.Double),
        sa.Column("stale", sa.BigInteger, nullable=False),
        sa.Column("opened_at", moment),
        sa.Column("nonce", sa.Text, nullable=False),
        sa.Column("back_to", sa.BigInteger),
        sa.PrimaryKeyConstraint("name", name="pk_runs"),
    )
    op.create_table(
        "rounds",
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("goal", sa.BigInteger, nullable=False),
        sa.Column("quorum", sa.BigInteger, nullable=False),
        sa.Column("opened_at", moment, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("duration_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run", "number", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run"], ["runs.name"], name="fk_rounds_runs"),
    )
    op.create_table(
        "assignments",
        sa.Column("assignment", sa.Text, nullable=False),
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("round", sa.BigInteger, nullable=False),
        sa.Column("place", sa.BigInteger, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("held_out", sa.JSON, nullable=False),
        sa.Column("work", sa.JSON, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("assignment", name="pk_assignments"),
        sa.ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.number"], name="fk_assignments_rounds"),
    )
    op.create_index("ix_assignments_run_round_place", "assignments", ["run", "round", "place"])
    op.create_table(
        "versions",
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("checkpoint", sa.Text, nullable=False),
        sa.Column("published_at", moment, nullable=False),
        sa.Column("test", sa.JSON, nullable=False),
        sa.Column("clients", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("run", "number", name="pk_versions"),
        sa.ForeignKeyConstraint(["run"], ["runs.name"], name="fk_versions_runs"),
    )
    op.create_table(
        "clients",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("software", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("heard_at", moment, nullable=False),
        sa.Column("accepted", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("refused", sa.BigInteger, nullable=False),
        sa.Column("quarantine", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_clients"),
    )
    op.create_table(
        "events",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("told", sa.Text, nullable=False),
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("round", sa.BigInteger),
        sa.Column("client", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_events"),
        sa.UniqueConstraint("id", name="uq_events_id"),
    )
    op.create_index("ix_events_run_sequence", "events", ["run", "sequence"])
    op.create_index("ix_events_client_sequence", "events", ["client", "sequence"])
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )

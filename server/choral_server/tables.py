"""The tables, one schema for SQLite and PostgreSQL, and each record as a row. A change here needs a migration (`migrations`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from choral.messages import VersionRef
from choral.metrics import Metric
from choral.plan import Kind
from choral.privacy.accounting import Release, Sampling
from sqlalchemy import Column, ForeignKey, ForeignKeyConstraint, Index, MetaData, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from choral_server.caller import Role
from choral_server.history import Entry
from choral_server.objective import Progress
from choral_server.records import (
    CENTRAL,
    DISTRIBUTED,
    ClientRecord,
    EventRecord,
    MemberRecord,
    RunRecord,
    RunState,
    SpendingRecord,
    SpendingState,
    TokenRecord,
    VersionRecord,
)
from choral_server.rounds import Part, Parts, PartState, Round, RoundState

Row = dict[str, Any]
INSERT: Mapping[str, Callable[[Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""by dialect, the insert that knows ON CONFLICT"""


def storable(text: str) -> str:
    """A text as every database can hold it."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


class Words(TypeDecorator[str]):
    """Text, also from strangers: what a database cannot hold (NUL on PostgreSQL, half a surrogate on both) is replaced."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """As it is stored."""
        return storable(value) if value is not None else None


class Moment(TypeDecorator[datetime]):
    """An instant, to the microsecond, stored in UTC: SQLite knows no time zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As it is stored."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As it was."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Metrics(TypeDecorator[tuple[Metric, ...]]):
    """Metrics as a JSON list of [name, value, examples]; NaN and the infinities, for which JSON has no numbers, as strings."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[Metric, ...] | None, dialect: Dialect) -> Any:
        """As they are stored."""
        metrics = value or ()
        return [[m.name, float(m.value) if math.isfinite(m.value) else str(float(m.value)), m.examples] for m in metrics]

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[Metric, ...]:
        """As they were."""
        return tuple(Metric(name, float(number), examples) for name, number, examples in value)


METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

RUNS = Table(
    "runs",
    METADATA,
    Column("name", Words, primary_key=True),
    Column("place", sa.BigInteger, nullable=False),  # 0, 1, 2, … in the order in which runs were begun
    Column("task", Words, nullable=False),
    Column("task_version", Words, nullable=False),
    Column("rounds_planned", sa.BigInteger, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("state", Words, nullable=False),
    Column("reason", Words, nullable=False),
    Column("rounds_done", sa.BigInteger, nullable=False),
    Column("next_round", sa.BigInteger, nullable=False),
    Column("latest", sa.BigInteger, nullable=False),
    Column("has_statistics", sa.Boolean, nullable=False),
    Column("paused", sa.Boolean, nullable=False),
    Column("abandoned", sa.BigInteger, nullable=False),
    Column("best", sa.BigInteger),
    Column("best_value", sa.Double),
    Column("stale", sa.BigInteger, nullable=False),
    Column("opened_at", Moment),
    Column("nonce", Words, nullable=False),
    Column("back_to", sa.BigInteger),
)

ROUNDS = Table(
    "rounds",
    METADATA,
    Column("run", ForeignKey(RUNS.c.name), primary_key=True),
    Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Words, nullable=False),
    Column("version", sa.BigInteger, nullable=False),
    Column("goal", sa.BigInteger, nullable=False),
    Column("quorum", sa.BigInteger, nullable=False),
    Column("opened_at", Moment, nullable=False),
    Column("state", Words, nullable=False),
    Column("reason", Words, nullable=False),
    Column("duration_s", sa.Double, nullable=False),
    Column("plan", sa.LargeBinary, nullable=False, server_default=""),
    Column("parent", sa.LargeBinary, nullable=False, server_default=""),
)

ASSIGNMENTS = Table(
    "assignments",
    METADATA,
    Column("assignment", Words, primary_key=True),
    Column("run", Words, nullable=False),
    Column("round", sa.BigInteger, nullable=False),
    Column("place", sa.BigInteger, nullable=False),  # 0, 1, 2, … in the order in which the round's parts were given
    Column("client", Words, nullable=False),
    Column("state", Words, nullable=False),
    Column("reason", Words, nullable=False),
    Column("examples", sa.BigInteger, nullable=False),
    Column("held_out", Metrics, nullable=False),
    Column("work", Metrics, nullable=False),
    Column("digest", sa.LargeBinary, nullable=False),
    Column("codec", Words, nullable=False, server_default=""),
    Column("payload_bytes", sa.BigInteger, nullable=False, server_default="0"),
    ForeignKeyConstraint(["run", "round"], [ROUNDS.c.run, ROUNDS.c.number]),
    Index(None, "run", "round", "place"),
)

VERSIONS = Table(
    "versions",
    METADATA,
    Column("run", ForeignKey(RUNS.c.name), primary_key=True),
    Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    Column("digest", sa.LargeBinary, nullable=False),
    Column("size_bytes", sa.BigInteger, nullable=False),
    Column("checkpoint", Words, nullable=False),
    Column("published_at", Moment, nullable=False),
    Column("test", Metrics, nullable=False),
    Column("clients", Metrics, nullable=False),
)

CLIENTS = Table(
    "clients",
    METADATA,
    Column("name", Words, primary_key=True),
    Column("examples", sa.BigInteger, nullable=False),
    Column("software", Words, nullable=False),
    Column("address", Words, nullable=False),
    Column("heard_at", Moment, nullable=False),
    Column("accepted", sa.BigInteger, nullable=False),
    Column("reason", Words, nullable=False),
    Column("refused", sa.BigInteger, nullable=False),
    Column("quarantine", Words, nullable=False),
    Column("waits_since", Moment),
    Column("away_until", Moment),
)

EVENTS = Table(
    "events",
    METADATA,
    # only this type numbers rows by itself on SQLite
    Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Words, nullable=False, unique=True),
    Column("at", Moment, nullable=False),
    Column("what", Words, nullable=False),
    Column("told", Words, nullable=False),
    Column("run", Words, nullable=False),
    Column("round", sa.BigInteger),
    Column("client", Words, nullable=False),
    Column("by", Words, nullable=False),
    Index(None, "run", "sequence"),
    Index(None, "client", "sequence"),
)

MEMBERS = Table(
    "members",
    METADATA,
    Column("name", Words, primary_key=True),
    Column("role", Words, nullable=False),
    Column("key", sa.LargeBinary, nullable=False),
    Column("signing_key", sa.LargeBinary, nullable=False),
    Column("enrolled_at", Moment),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
    Column("reason", Words, nullable=False),
)

TOKENS = Table(
    "tokens",
    METADATA,
    Column("digest", Words, primary_key=True),
    Column("name", Words, nullable=False),
    Column("role", Words, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("replace", sa.Boolean, nullable=False),
    Column("used_by", sa.LargeBinary, nullable=False),
    Column("void", sa.Boolean, nullable=False),
)

HISTORY = Table(
    "history",
    METADATA,
    Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    Column("at", Moment, nullable=False),
    Column("what", Words, nullable=False),
    Column("facts", Words, nullable=False),
    Column("before", sa.LargeBinary, nullable=False),
    Column("digest", sa.LargeBinary, nullable=False),
    Column("signature", sa.LargeBinary, nullable=False),
)

SPENDINGS = Table(
    "spendings",
    METADATA,
    Column("run", ForeignKey(RUNS.c.name), primary_key=True),
    Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Words, nullable=False),
    Column("at", Moment, nullable=False),
    Column("noise", sa.Double, nullable=False),
    Column("sampling", Words, nullable=False),
    Column("expected", sa.BigInteger, nullable=False),
    Column("population", sa.BigInteger, nullable=False),
    Column("clip", sa.Double, nullable=False),
    Column("delta", sa.Double, nullable=False),
    Column("epsilon_models", sa.Double, nullable=False),
    Column("epsilon_coordinator", sa.Double, nullable=False),
    Column("state", Words, nullable=False),
    Column("next_clip", sa.Double),
    Column("rounds", sa.BigInteger, nullable=False),
    Column("mode", Words, nullable=False, server_default=CENTRAL),
)

LEASES = Table(
    "leases",
    METADATA,
    Column("name", Words, primary_key=True),
    Column("holder", Words, nullable=False),
    Column("epoch", sa.BigInteger, nullable=False),
    Column("expires_at", sa.Double, nullable=False),  # seconds since 1970 by the database's clock
)


def run_to_row(record: RunRecord, place: int) -> Row:
    """A run; `place` says how many were begun before it."""
    return {
        "name": record.name,
        "place": place,
        "task": record.task,
        "task_version": record.task_version,
        "rounds_planned": record.rounds_planned,
        "started_at": record.started_at,
        "state": record.state.value,
        "reason": record.reason,
        "rounds_done": record.rounds_done,
        "next_round": record.next_round,
        "latest": record.latest,
        "has_statistics": record.has_statistics,
        "paused": record.paused,
        "abandoned": record.abandoned,
        "best": record.progress.best,
        "best_value": record.progress.value,
        "stale": record.progress.stale,
        "opened_at": record.opened_at,
        "nonce": record.nonce,
        "back_to": record.back_to,
    }


def run_from_row(row: Row) -> RunRecord:
    """The run that was stored."""
    content = dict(row)
    del content["place"]
    progress = Progress(best=content.pop("best"), value=content.pop("best_value"), stale=content.pop("stale"))
    return RunRecord(**content | {"state": RunState(content["state"]), "progress": progress})


def round_to_row(record: Round) -> Row:
    """A round without its parts."""
    return {
        "run": record.run,
        "number": record.number,
        "kind": record.kind.value,
        "version": record.version,
        "goal": record.goal,
        "quorum": record.quorum,
        "opened_at": record.opened_at,
        "state": record.state.value,
        "reason": record.reason,
        "duration_s": record.duration_s,
        "plan": record.plan,
        "parent": record.parent,
    }


def round_from_row(row: Row, parts: Iterable[Part]) -> Round:
    """The round that was stored, with its parts."""
    kinds = {"kind": Kind(row["kind"]), "state": RoundState(row["state"])}
    return Round(**dict(row) | kinds, parts=Parts(parts))


def part_to_row(part: Part, run: str, number: int, place: int) -> Row:
    """A part of round `number` of `run`; `place` says how many were given before it."""
    return {
        "assignment": part.assignment,
        "run": run,
        "round": number,
        "place": place,
        "client": part.client,
        "state": part.state.value,
        "reason": part.reason,
        "examples": part.examples,
        "held_out": part.held_out,
        "work": part.work,
        "digest": part.digest,
        "codec": part.codec,
        "payload_bytes": part.payload_bytes,
    }


def part_from_row(row: Row) -> Part:
    """The part that was stored."""
    content = dict(row)
    del content["run"], content["round"], content["place"]
    return Part(**content | {"state": PartState(content["state"])})


def version_to_row(record: VersionRecord) -> Row:
    """A version."""
    return {
        "run": record.run,
        "number": record.version.number,
        "digest": record.version.digest,
        "size_bytes": record.version.size_bytes,
        "checkpoint": record.checkpoint,
        "published_at": record.published_at,
        "test": record.test,
        "clients": record.clients,
    }


def version_from_row(row: Row) -> VersionRecord:
    """The version that was stored."""
    content = dict(row)
    version = VersionRef(content.pop("number"), content.pop("digest"), content.pop("size_bytes"))
    return VersionRecord(version=version, **content)


def client_to_row(record: ClientRecord) -> Row:
    """A client, whether it attends or not."""
    return {
        "name": record.name,
        "examples": record.examples,
        "software": record.software,
        "address": record.address,
        "heard_at": record.heard_at,
        "accepted": record.accepted,
        "reason": record.reason,
        "refused": record.refused,
        "quarantine": record.quarantine,
        "waits_since": record.waits_since,
        "away_until": record.away_until,
    }


def client_from_row(row: Row) -> ClientRecord:
    """The client that was stored; it does not attend."""
    return ClientRecord(attending=False, **row)


def event_to_row(record: EventRecord) -> Row:
    """An event."""
    return {
        "id": record.id,
        "at": record.at,
        "what": record.what,
        "told": record.told,
        "run": record.run,
        "round": record.round,
        "client": record.client,
        "by": record.by,
    }


def event_from_row(row: Row) -> EventRecord:
    """The event that was stored."""
    content = dict(row)
    del content["sequence"]
    return EventRecord(**content)


def member_to_row(record: MemberRecord) -> Row:
    """A member."""
    return {
        "name": record.name,
        "role": record.role.value,
        "key": record.key,
        "signing_key": record.signing_key,
        "enrolled_at": record.enrolled_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
        "reason": record.reason,
    }


def member_from_row(row: Row) -> MemberRecord:
    """The member that was stored."""
    return MemberRecord(**dict(row) | {"role": Role(row["role"])})


def token_to_row(record: TokenRecord) -> Row:
    """A token."""
    return {
        "digest": record.digest,
        "name": record.name,
        "role": record.role.value,
        "expires_at": record.expires_at,
        "replace": record.replace,
        "used_by": record.used_by,
        "void": record.void,
    }


def token_from_row(row: Row) -> TokenRecord:
    """The token that was stored."""
    return TokenRecord(**dict(row) | {"role": Role(row["role"])})


def spending_to_row(record: SpendingRecord) -> Row:
    """What a round costs in privacy."""
    release = record.release
    return {
        "run": record.run,
        "round": record.round,
        "kind": record.kind.value,
        "at": record.at,
        "noise": release.noise,
        "sampling": release.sampling.value,
        "expected": release.expected,
        "population": release.population,
        "clip": record.clip,
        "delta": record.delta,
        "epsilon_models": record.epsilon_models,
        "epsilon_coordinator": record.epsilon_coordinator,
        "state": record.state.value,
        "next_clip": record.next_clip,
        "rounds": record.rounds,
        "mode": record.mode,
    }


def spending_from_row(row: Row) -> SpendingRecord:
    """The spending that was stored."""
    kept = dict(row)
    terms = {name: kept.pop(name) for name in ("noise", "expected", "population")}
    release = Release(**terms, sampling=Sampling(kept.pop("sampling")), whole=kept["mode"] == DISTRIBUTED)
    return SpendingRecord(
        **kept | {"kind": Kind(kept["kind"]), "state": SpendingState(kept["state"])},
        release=release,
    )


def entry_to_row(entry: Entry) -> Row:
    """An entry of the history."""
    return {
        "sequence": entry.sequence,
        "at": entry.at,
        "what": entry.what,
        "facts": entry.facts,
        "before": entry.before,
        "digest": entry.digest,
        "signature": entry.signature,
    }


def entry_from_row(row: Row) -> Entry:
    """The entry that was stored."""
    return Entry(**row)

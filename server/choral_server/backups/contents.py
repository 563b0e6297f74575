"""What a backup is: one file with all records and versions, of one moment. The format, for who writes and who reads it.

A tar of

    backup.json            what this is: format, release, schema, when, of which database
    runs/RUN/versions/…    the checkpoint files as the artifact store has them, the newest and the best of each run first
    tables/TABLE.jsonl     the rows, all of one moment, a JSON object a line
    history.key            the key that signs the history, without which it cannot go on: it makes the file a secret
    contents.json          size and SHA-256 of every file above; one that is not named here does not count

Other keys, certificates and the configuration are not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from choral.errors import ConfigError
from choral.messages import VersionRef
from choral.metrics import Metric
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from choral_server.config import ServerConfig
from choral_server.tables import LEASES, METADATA, Metrics, Moment, Row

T = TypeVar("T")
FORMAT = 1
Progress = Callable[[int, int], None]
"""called with the bytes done and the bytes in all"""
TABLES = [table for table in METADATA.sorted_tables if table is not LEASES]  # each behind those that it refers to
ABOUT, CONTENTS = "backup.json", "contents.json"
ROWS_AT_A_TIME = 1000
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Summary:
    """What a backup holds, or what a restoration brought back. `notes` says of what, and why, it is less than one may think."""

    file: Path
    taken_at: datetime
    runs: int
    versions: int
    size_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """A version as its row has it."""

    run: str
    number: int
    digest: bytes
    size_bytes: int

    @property
    def weights(self) -> str:
        """The key of the checkpoint file."""
        return f"{versions_prefix(self.run)}{self.number:06d}.safetensors"

    @property
    def optimizer(self) -> str:
        """The key of the server optimizer's state."""
        return f"{versions_prefix(self.run)}{self.number:06d}.optimizer.safetensors"

    @property
    def reference(self) -> VersionRef:
        """As it is announced."""
        return VersionRef(self.number, self.digest, self.size_bytes)

    @property
    def key(self) -> tuple[str, int]:
        """Which one it is."""
        return self.run, self.number


def encode(table: Table, row: Row) -> str:
    """A row as a line of JSON."""
    return json.dumps({column.name: _plain(row[column.name]) for column in table.c})


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case bytes():
            return value.hex()
        case float():
            return value if math.isfinite(value) else str(value)
        case tuple():
            return [[metric.name, _plain(float(metric.value)), metric.examples] for metric in value]
    return value


def _decode(table: Table, line: bytes) -> Row:
    """Raises ValueError, TypeError, KeyError, OverflowError or RecursionError: it is no row of that table."""
    content = json.loads(line)
    if set(content) != set(table.c.keys()):
        raise ValueError(f"a row of {table.name} has other columns")
    return {column.name: _value(column, content[column.name]) for column in table.c}


def _value(column: sa.Column[Any], plain: Any) -> Any:
    if plain is None and column.nullable:
        return None
    match column.type:
        case Moment():
            moment = datetime.fromisoformat(plain)
            if moment.tzinfo is None:
                raise ValueError(f"{column.name} {plain!r} has no time zone")
            return moment
        case Metrics():
            return tuple(Metric(_typed(str, name), float(number), _whole(examples)) for name, number, examples in plain)
        case sa.LargeBinary():
            return bytes.fromhex(plain)
        case sa.Double():
            return float(plain)
        case sa.Boolean():
            return _typed(bool, plain)
        case sa.Integer():
            return _whole(plain)
    return _typed(str, plain)


def _typed(kind: type[T], plain: Any) -> T:
    """SQLite would keep anything in any column, and the coordinator find it there later."""
    if type(plain) is not kind:
        raise TypeError(f"{str(plain)[:80]!r} is no {kind.__name__}")
    return plain


def _whole(plain: Any) -> int:
    number = _typed(int, plain)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"a number of {number.bit_length()} bits")
    return number


def rows_in(table: Table, file: IO[bytes]) -> Iterator[Row]:
    """The rows in a file, from its beginning."""
    file.seek(0)
    for line in file:
        yield _decode(table, line)


def needed_versions(runs: Iterable[Row]) -> Iterator[tuple[str, int]]:
    """The versions without which a run cannot go on as it was: its newest and its best."""
    for run in runs:
        yield run["name"], run["latest"]
        if run["best"] is not None:
            yield run["name"], run["best"]


def versions_prefix(run: str) -> str:
    """With what the keys of a run's versions begin, in the artifact store as in a backup."""
    return f"runs/{run}/versions/"


def rows_name(table: Table) -> str:
    """The file with a table's rows."""
    return f"tables/{table.name}.jsonl"


def known_schemas() -> list[str]:
    """The schemas that this release knows, the newest first."""
    config = Config()
    config.set_main_option("script_location", "choral_server:migrations")
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]


async def first_row(connection: AsyncConnection, query: sa.Select[Any]) -> Row | None:
    """The first row that a query finds, if it finds any."""
    row = (await connection.execute(query)).first()
    return row._asdict() if row is not None else None


def database_file(config: ServerConfig) -> Path | None:
    """The file of a database that is one. Raises ConfigError: it is in no file and on no server."""
    scheme, _, rest = config.database_url.partition("://")
    if scheme != "sqlite":
        return None
    if rest in ("", "/", "/:memory:"):
        raise ConfigError("database: sqlite:// is in the memory of the coordinator that uses it: nobody else can read or write it")
    return Path(rest.removeprefix("/"))

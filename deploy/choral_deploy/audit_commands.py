"""`choral audit`: what happened, whether that is what was signed, and where a checkpoint comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from choral.heads import Head
    from choral_server.audit import Ancestor

app = typer.Typer(help="See and verify the history, prove a checkpoint's line.", no_args_is_help=True)
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's configuration file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=2**31 - 1, help="How many, newest first.")]
_DEFAULT = Path("choral.yaml")
_AFTER_S = 1.0  # what is done sooner needs no progress bar


@app.command()
def show(config: ConfigOption = _DEFAULT, limit: LimitOption = 20, json: JsonOption = False) -> None:
    """What happened, newest first; `verify` says whether it is true."""
    from choral_server.audit import newest
    from choral_server.config import load
    from choral_server.facts import in_words

    entries = asyncio.run(newest(load(config), limit))
    if json:
        plain = [
            {"entry": e.sequence, "at": e.at.isoformat(), "what": e.what, "facts": _facts(e), "sha256": e.digest.hex()}
            for e in entries
        ]
        _print_json(plain)
        return
    rows = [(e.sequence, _moment(e.at), e.what, in_words(e.what, _facts(e)), e.digest.hex()[:12]) for e in entries]
    _table(("entry", "at", "what", "told", "sha256"), rows)


@app.command()
def verify(
    config: ConfigOption = _DEFAULT,
    head: Annotated[list[Path] | None, typer.Option(help="A client's heads.jsonl; once for each.")] = None,
    json: JsonOption = False,
) -> None:
    """Find entries that were changed, dropped, moved or cut off, and records that are not what they tell; exit code 0 if none."""
    from choral.errors import HistoryBroken
    from choral_server.audit import audit
    from choral_server.config import load

    heads = {str(path): _heads(path) for path in head or []}
    with _bar("verifying") as progress:
        found = asyncio.run(audit(load(config), heads, progress))
    keys = {str(entry): key.hex() for entry, key in found.keys.items()}
    if json:
        faults = [{"entry": fault.entry, "found": fault.found, "cure": fault.cure} for fault in found.faults]
        _print_json({"entries": found.entries, "heads": found.heads, "keys": keys, "faults": faults})
    elif found.faults:
        rows = [(fault.entry if fault.entry is not None else "", fault.found, fault.cure) for fault in found.faults]
        _table(("entry", "found", "what to do"), rows)
    if found.faults:
        raise HistoryBroken(f"history: {len(found.faults)} faults in {found.entries} entries, the first: {found.faults[0].found}")
    if not json:
        typer.echo(f"history: {found.entries} entries are as they were signed, and the records are what they tell")
        for entry, key in keys.items():
            typer.echo(f"key {key[:16]} signs from entry {entry} on" + ("" if entry == "1" else ": the one before was replaced"))
        typer.echo(_held(found.heads))


def _held(heads: int) -> str:
    if heads:
        return f"{heads} heads that clients were handed are in it"
    return "no client's heads were given (--head FILE): only they show whether newest entries were removed with their records"


@app.command()
def lineage(
    checkpoint: Annotated[Path, typer.Argument(help="A version's safetensors file.")],
    config: ConfigOption = _DEFAULT,
    json: JsonOption = False,
) -> None:
    """Prove where a checkpoint comes from: version by version, and round by round, back to the first."""
    import hashlib

    from choral.errors import ConfigError
    from choral_server import audit
    from choral_server.config import load

    try:
        with checkpoint.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ConfigError(f"{checkpoint} cannot be read ({error.strerror}): give a checkpoint file") from error
    with _bar("verifying") as progress:
        line = asyncio.run(audit.lineage(load(config), digest, progress))
    if json:
        _print_json([_plain(ancestor) for ancestor in line])
        return
    _table(("version", "run", "sha256", "made by", "plan", "published", "entry"), [_cells(ancestor) for ancestor in line])


@app.command("renew-key")
def renew_key(config: ConfigOption = _DEFAULT) -> None:
    """Let a history whose key is lost go on with a new one, while no coordinator works. Clients will warn of it."""
    from datetime import UTC, datetime

    from choral_server.config import load
    from choral_server.history_key import path_of, renew

    settings = load(config)
    key = asyncio.run(renew(settings, lambda: datetime.now(UTC)))
    typer.echo(
        f"the history goes on with key {key} ({path_of(settings.state)}); clients warn until heads.jsonl is moved away there"
    )


def _cells(ancestor: Ancestor) -> tuple[object, ...]:
    version, made_in = ancestor.version, ancestor.round
    by, plan = "", ""
    if made_in is not None:
        by = f"{made_in['kind']} round {made_in['round']}, {made_in['accepted']} of {made_in['asked']} accepted"
        plan = made_in["plan"][:12]
    elif version["parent"] is not None:
        by = f"version {version['parent']['number']} of run {version['parent']['run']} again"
    return version["number"], version["run"], version["digest"][:12], by, plan, _moment(ancestor.at), ancestor.entry


def _plain(ancestor: Ancestor) -> dict[str, Any]:
    told = {"entry": ancestor.entry, "at": ancestor.at.isoformat()}
    return told | {"version": ancestor.version, "round": ancestor.round}


def _facts(entry: Any) -> Any:
    try:
        return entry.content
    except ValueError:
        return {}


def _heads(path: Path) -> list[Head]:
    from choral.errors import ConfigError
    from choral.heads import from_line

    heads = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                heads.append(from_line(line))
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is no head ({error}): give a client's heads.jsonl as it is") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a client's heads.jsonl") from error
    return heads


def _moment(at: Any) -> str:
    moment: str = at.strftime("%Y-%m-%d %H:%M:%S UTC")
    return moment


def _print_json(content: Any) -> None:
    from json import dumps

    typer.echo(dumps(content, indent=1))


def _table(columns: tuple[str, ...], rows: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from choral_deploy.cells import cell

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(cell, row))
    Console().print(table)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal, for what takes longer than a moment."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began = Console(file=sys.stderr), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar = shown.add_task(name, total=None)

    def progress(completed: int, total: int) -> None:
        if time.monotonic() - began > _AFTER_S and not shown.live.is_started:
            shown.start()
        shown.update(bar, completed=completed, total=total)

    try:
        yield progress
    finally:
        shown.stop()

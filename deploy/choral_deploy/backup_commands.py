"""`choral backup` and `choral restore`: all records and versions in one file, and back from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's configuration file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")]
_DEFAULT = Path("choral.yaml")
_NOT_IN_IT = "not in it: certificates, their keys and the configuration – copy the folder of {} yourself, without the state folder"


def backup(
    file: Annotated[Path, typer.Argument(help="File to write; one that is there is replaced.")],
    config: ConfigOption = _DEFAULT,
    json: JsonOption = False,
) -> None:
    """Write all records and versions to one file, also while the coordinator works. It holds the history's key: keep it secret."""
    from choral_server.backups.taking import back_up

    _do(back_up, "backed up", file, config, json)


def restore(
    file: Annotated[Path, typer.Argument(help="File that `choral backup` wrote.")],
    config: ConfigOption = _DEFAULT,
    json: JsonOption = False,
) -> None:
    """Bring a backup back into an empty database, of whichever kind, while no coordinator works."""
    from choral_server.backups.restoring import restore

    _do(restore, "restored", file, config, json)


def _do(what: Callable[..., Any], done: str, file: Path, config: Path, as_json: bool) -> None:
    from datetime import UTC, datetime

    from choral import logs
    from choral_server.config import load

    logs.configure(level="warning")  # a database that is waited for
    settings = load(config)
    with _bar(file.name) as progress:
        summary = asyncio.run(what(settings, file, datetime.now(UTC), progress))
    left = _NOT_IN_IT.format(config)
    if as_json:
        from json import dumps

        told = {
            "file": str(summary.file),
            "taken_at": summary.taken_at.isoformat(),
            "runs": summary.runs,
            "versions": summary.versions,
            "bytes": summary.size_bytes,
            "notes": summary.notes,
        }
        typer.echo(dumps(told | {"not_in_it": left}))
        return
    for note in summary.notes:
        typer.echo(note)
    typer.echo(f"{done}: runs: {summary.runs}, versions: {summary.versions}, bytes: {summary.size_bytes} ({summary.file})")
    typer.echo(left)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(name, total=None)
        yield lambda completed, total: shown.update(bar, completed=completed, total=total)

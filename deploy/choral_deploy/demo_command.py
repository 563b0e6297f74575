"""`choral demo`: see a federation train, with one command."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")


def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 100,
    clients: Annotated[int, typer.Option(min=1, max=64, help="How many client processes; the first two are alice and bob.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the shards, the initial weights and the shuffling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the model, the plot, the report and the logs.")] = Path("choral-demo"),
    secure: Annotated[bool, typer.Option("--secure", help="Secure aggregation: the coordinator sees sums alone.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on the last line.")] = False,
) -> None:
    """Train Boston housing on this machine: a coordinator and clients, each a process with its own shard, over TLS."""
    from rich.console import Console

    from choral_deploy.demo import names, run

    try:
        report = asyncio.run(_ending_on_signals(run(rounds, names(clients), seed, out, secure)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("choral: interrupted; every process of the demo has ended", err=True)
        raise typer.Exit(130) from None
    report.print(Console())
    if json:
        typer.echo(report.to_json())


async def _ending_on_signals(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which Ctrl-C and SIGTERM cancel, also where a shell started this process with SIGINT ignored."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task

"""`choral demo`: see a federation train, and an attack on it, with one command each."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

app = typer.Typer(invoke_without_command=True)


@app.callback()
def demo(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 100,
    clients: Annotated[int, typer.Option(min=1, max=64, help="How many client processes; the first two are alice and bob.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the shards, the initial weights and the shuffling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the model, the plot, the report and the logs.")] = Path("choral-demo"),
    secure: Annotated[bool, typer.Option("--secure", help="Secure aggregation: the coordinator sees sums alone.")] = False,
    dp_epsilon: Annotated[
        float | None, typer.Option(help="Differential privacy: the ε that all rounds together may cost, at δ = 1e-5.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on the last line.")] = False,
) -> None:
    """Train Boston housing on this machine: a coordinator and clients, each a process with its own shard, over TLS."""
    if context.invoked_subcommand is not None:
        _refuse_lost_flags(context, context.invoked_subcommand)
        return
    from rich.console import Console

    from choral_deploy.demo import names, run

    try:
        report = asyncio.run(_ending_on_signals(run(rounds, names(clients), seed, out, secure, dp_epsilon)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("choral: interrupted; every process of the demo has ended", err=True)
        raise typer.Exit(130) from None
    report.print(Console())
    if json:
        typer.echo(report.to_json())


@app.command()
def attack(
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of who takes part; keys are new each time.")] = 0,
    clients: Annotated[int, typer.Option(help="How many clients are in each secure sum; 2 to 100.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the picture, attack.png.")] = Path("choral-attack"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, and nothing else.")] = False,
) -> None:
    """Read what clients have trained on from their updates: from a plain upload, from a masked one, and from the sum."""
    from choral_client.work import set_threads
    from rich.console import Console

    from choral_deploy.attack import run

    set_threads(1)  # the model is small
    report = run(clients, seed, out)
    if json:
        typer.echo(report.to_json())
    else:
        report.print(Console())


def _refuse_lost_flags(context: typer.Context, command: str) -> None:
    """Raises ConfigError: flags stand before the command, where they would be read and not used."""
    from choral.errors import ConfigError

    sources = {name: context.get_parameter_source(name) for name in context.params}
    lost = ", ".join(f"--{name}" for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    if lost:
        raise ConfigError(f"{lost}: what stands before {command} is for the demo itself; write it after {command}")


async def _ending_on_signals(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which Ctrl-C and SIGTERM cancel, also where a shell started this process with SIGINT ignored."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task

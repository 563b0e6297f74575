"""`choral server`: run a coordinator, prepare one, ask after its health."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer

from choral_deploy.where import DEFAULT as _DEFAULT
from choral_deploy.where import ConfigOption, WhereOption

app = typer.Typer(help="Run a coordinator.", invoke_without_command=True)
Role = Literal["device", "operator", "viewer"]


@app.callback()
def server(
    context: typer.Context,
    config: ConfigOption = _DEFAULT,
    log_format: Annotated[Literal["console", "json"], typer.Option(help="How logs are written to standard error.")] = "console",
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="The least that is logged.")] = "info",
) -> None:
    """Run a coordinator until it is told to end (SIGTERM lets the round under way finish)."""
    if context.invoked_subcommand is not None:
        return
    from choral import memory

    memory.few_heaps()
    from choral_server.task_process import TaskProcess

    process = TaskProcess()  # first: it imports torch while this one imports all the rest
    from choral_server.config import load

    settings = load(config)
    from choral import logs
    from choral_server.app import serve

    from choral_deploy.ending import leave

    logs.configure(log_format, log_level)
    leave(asyncio.run(serve(settings, process=process)))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to prepare.")],
    host: Annotated[list[str], typer.Option(help="Name or address by which clients reach this machine; once for each.")],
    task: Annotated[str, typer.Option(help="module:attribute of the task.")] = "choral.tasks.boston_housing:task",
    port: Annotated[int, typer.Option(min=1, max=65534, help="Port for clients; they enrol on the one after it.")] = 8470,
    clients: Annotated[int, typer.Option(min=1, help="How many clients take part in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to train.")] = 100,
) -> None:
    """Make a certificate authority, the server's certificate and a configuration file."""
    from choral.errors import ConfigError
    from choral_server.trust import make_authority

    if (folder / _DEFAULT).exists():
        raise ConfigError(f"{folder / _DEFAULT} exists already: choose another folder")
    make_authority(folder, host)
    (folder / _DEFAULT).write_text(
        _TEMPLATE.format(task=task, port=port, enrolment=port + 1, clients=clients, rounds=rounds), encoding="utf-8"
    )
    config = folder / _DEFAULT
    typer.echo(f"Prepared {folder}. Start the coordinator: choral server --config {config}")
    typer.echo(f"Then, for each client, make a token:  choral server token NAME --config {config}")


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="The name that its bearer will have.")],
    config: WhereOption = _DEFAULT,
    expires: Annotated[str, typer.Option(help="For how long it can be used: 90s, 30m, 1h, 7d.")] = "1h",
    role: Annotated[Role, typer.Option(help="What its bearer may do: take part, steer, or look.")] = "device",
    replace: Annotated[bool, typer.Option(help="It may take the place of a member of that name.")] = False,
) -> None:
    """Print a one-time token with which NAME enrols: `choral client enrol TOKEN --server HOST:PORT`."""
    from choral_deploy.durations import seconds
    from choral_deploy.operator import call

    asked = {"name": name, "role": role, "expires_s": seconds(expires), "replace": replace}
    typer.echo(call(config, "IssueToken", **asked).token)


@app.command()
def health(config: WhereOption = _DEFAULT) -> None:
    """Say whether the coordinator with this configuration answers; exit code 0 if it does."""
    from choral_deploy.operator import Operator

    asyncio.run(Operator.at(config).health())
    typer.echo("serving")


_TEMPLATE = """\
# A Choral coordinator. Every key is explained in docs/configuration.md.
listen: 0.0.0.0:{port}
tls:
  certificate: server.pem
  key: server.key
  ca: ca.pem
  ca_key: ca.key # signs the certificates of those who enrol, on port {enrolment}
state: state
task: {task}
run:
  rounds: {rounds}
  cohort_size: {clients}
  deadline_s: 600
"""

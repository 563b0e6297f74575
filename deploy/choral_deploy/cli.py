"""The `choral` command: one place where the parts that are installed become commands."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer
from choral import __version__
from choral.errors import ChoralError

from choral_deploy import privacy_commands
from choral_deploy.ending import leave

app = typer.Typer(
    name="choral",
    help="Federated learning for PyTorch: one model, trained by many devices that keep their data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would print, our own messages say

# A device's image has no server code, and a server's need not have the client's: what is absent is not offered.
has_server = find_spec("choral_server") is not None
has_client = find_spec("choral_client") is not None

app.add_typer(privacy_commands.app, name="privacy")
if has_server:
    from choral_deploy import (
        audit_commands,
        authority_commands,
        backup_commands,
        doctor_command,
        operator_commands,
        server_commands,
    )

    app.add_typer(server_commands.app, name="server")
    operator_commands.add_to(app)
    app.add_typer(audit_commands.app, name="audit")
    app.add_typer(authority_commands.app, name="authority")
    privacy_commands.app.command()(privacy_commands.audit)
    privacy_commands.app.command()(privacy_commands.show)
    privacy_commands.app.command()(privacy_commands.charge)
    app.command()(doctor_command.doctor)
    app.command()(backup_commands.backup)
    app.command()(backup_commands.restore)
if has_client:
    from choral_deploy import client_commands

    app.add_typer(client_commands.app, name="client")
if has_server and has_client:
    from choral_deploy import demo_command

    app.add_typer(demo_command.app, name="demo")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"choral {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Federated learning for PyTorch: one model, trained by many devices that keep their data."""


def shards(
    data_set: Annotated[str, typer.Argument(help="boston_housing, breast_cancer or digits")],
    out: Annotated[str, typer.Option(help="Folder to write to.")],
    client: Annotated[list[str], typer.Option(help="Name of a client; once for each.")],
    seed: Annotated[int, typer.Option(help="Seed of the deal.")] = 0,
) -> None:
    """Deal a bundled data set into one CSV per client and a test set, to try things out."""
    from pathlib import Path

    from choral.tasks.shards import deal

    for name, path in deal(data_set, client, Path(out), seed).items():
        typer.echo(f"{name}\t{path}")


if has_server:  # a device has a shard of its own
    app.command()(shards)


def main() -> None:
    """Run the command. Every error that has a name ends in one line that says what to do, and in its exit code."""
    try:
        app()
    except ChoralError as error:
        print(f"choral: {error}", file=sys.stderr)  # noqa: T201
        leave(error.exit_code)
    except BrokenPipeError:  # `choral … | head`
        os._exit(0)
    except OSError as error:
        print(f"choral: {error.filename or 'the operating system'}: {error.strerror}", file=sys.stderr)  # noqa: T201
        leave(1)


if __name__ == "__main__":
    main()

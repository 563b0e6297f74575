"""`choral client`: run a device, see what it does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(help="Run a client.", invoke_without_command=True)
_MAX_SILENCE_S = 60.0


@app.callback()
def client(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file with these options as keys; flags win.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="host:port of the coordinator.")] = None,
    name: Annotated[str | None, typer.Option(help="This client's name, unique in the federation.")] = None,
    task: Annotated[str | None, typer.Option(help="module:attribute of the task.")] = None,
    data: Annotated[Path | None, typer.Option(help="This client's shard (CSV or Parquet).")] = None,
    token: Annotated[Path | None, typer.Option(help="File with a token, to enrol with if that was not done yet.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Who must have signed the coordinator's certificate; without enrolment.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="This client's own certificate; without enrolment.")] = None,
    key: Annotated[Path | None, typer.Option(help="The private key of that certificate.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder for the newest model; choral-NAME if not given.")] = None,
    guard: Annotated[Path | None, typer.Option(help="What this device refuses to do; STATE/guard.yaml, if it is there.")] = None,
    holdout: Annotated[float | None, typer.Option(help="Share of the shard that measures and never trains [0.1].")] = None,
    follow: Annotated[bool | None, typer.Option(help="Fetch every version when it is published [follow].")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for training.")] = None,
    plaintext: Annotated[bool | None, typer.Option("--plaintext", help="No TLS; loopback only.")] = None,
    first_contact_s: Annotated[float | None, typer.Option(help="Seconds to keep trying for a first answer [60].")] = None,
    longest_pause_s: Annotated[float | None, typer.Option(help="Longest pause between two attempts, in seconds [60].")] = None,
    log_format: Annotated[Literal["console", "json"], typer.Option(help="How logs are written to standard error.")] = "console",
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="The least that is logged.")] = "info",
) -> None:
    """Run a client until the run is over or it is told to end."""
    if context.invoked_subcommand is not None:
        return
    flags = {
        "server": server,
        "name": name,
        "task": task,
        "data": data,
        "token": token,
        "ca": ca,
        "certificate": certificate,
        "key": key,
        "state": state,
        "guard": guard,
        "holdout": holdout,
        "follow": follow,
        "threads": threads,
        "plaintext": plaintext,
        "first_contact_s": first_contact_s,
        "longest_pause_s": longest_pause_s,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = _config(config, given)  # before torch is imported
    from choral import logs, memory
    from choral_client.app import attend

    from choral_deploy.ending import leave

    logs.configure(log_format, log_level)
    memory.keep_freed()
    asyncio.run(attend(settings))
    leave(0)


@app.command()
def enrol(
    token: Annotated[str, typer.Argument(help="The token; @FILE to read it from a file, - from standard input.")],
    server: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    state: Annotated[Path | None, typer.Option(help="The state folder that gets the identity; choral-NAME if not given.")] = None,
) -> None:
    """Come to belong: make keys here, and get a certificate for them in exchange for a token."""
    from choral.address import HostPort
    from choral.errors import ConfigError
    from choral.token import Token
    from choral_client.config import folder_of
    from choral_client.enrolment import enrol

    from choral_deploy.given import text

    made = Token.parse(text(token))
    try:
        address = HostPort.parse(server)
    except ValueError as error:
        raise ConfigError(f"--server: {error}") from error
    folder = state if state is not None else folder_of(made.name)
    known = asyncio.run(enrol(made, address, folder))
    until = f"until {known.credentials.expires_at:%Y-%m-%d}"
    typer.echo(f"Enrolled as {known.role} {known.name}; the identity is in {known.folder}, its certificate valid {until}.")
    if known.role == "device":
        here = f"--name {known.name}" if state is None else f"--state {folder}"
        typer.echo(f"Now: choral client {here} --task MODULE:ATTRIBUTE --data SHARD")
    else:
        typer.echo(f"Now: choral runs list --config {folder}")


@app.command()
def fingerprint(
    name: Annotated[str | None, typer.Option(help="The client's name; that under which it enrolled, if not given.")] = None,
    state: Annotated[Path | None, typer.Option(help="Its state folder; choral-NAME if not given.")] = None,
) -> None:
    """Show this device's signing key, by which other clients know it; make it, if there is none."""
    from choral.fingerprint import shown_fingerprint, shown_key
    from choral_client.signing_key import SigningKey

    folder, known = _named(name, state)
    key = SigningKey.of(folder).public
    rows = {"name": known, "fingerprint": shown_fingerprint(key), "key": shown_key(key)}
    typer.echo("\n".join(f"{told:<12} {value}" for told, value in rows.items() if value is not None))


@app.command()
def voucher(
    file: Annotated[Path, typer.Argument(help="What `choral authority certify` has printed.")],
    name: Annotated[str | None, typer.Option(help="The client's name; that under which it enrolled, if not given.")] = None,
    state: Annotated[Path | None, typer.Option(help="Its state folder; choral-NAME if not given.")] = None,
    authority: Annotated[
        Path | None, typer.Option(help="Certificate to check it with; the guard's authority, if it has one.")
    ] = None,
) -> None:
    """Let an authority elsewhere certify this device's signing key, whatever the coordinator's authority says of it."""
    from datetime import UTC, datetime

    from choral.errors import ConfigError, Deceived, TrustError
    from choral.identity import certificates
    from choral.voucher import Voucher, check
    from choral_client.guard_file import GuardFile
    from choral_client.signing_key import SigningKey

    folder, known = _named(name, state)
    try:
        made = Voucher.parse(file.read_bytes(), str(file))
    except OSError as error:
        raise TrustError(f"{file} cannot be read ({error.strerror}): give a file that this user may read") from error
    if known is not None and made.name != known:
        raise ConfigError(f"{file} is for {made.name}, and this client is {known}: ask the authority for another")
    trusted = authority if authority is not None else GuardFile(folder).current().authority
    if trusted is not None:
        try:
            check(made.signature, made.name, made.key, certificates(trusted), datetime.now(UTC))
        except Deceived as error:
            raise TrustError(f"{file} is not by the authority in {trusted}, or that has expired: ask it for another") from error
    place = SigningKey.of(folder).keep(made)
    by = f"certified by {trusted}" if trusted is not None else "its signature unchecked: no --authority, and none in the guard"
    typer.echo(f"{place} says that this device is {made.name}; {by}. A running client shows it from its next round on.")


@app.command()
def status(state: Annotated[Path, typer.Argument(help="The client's state folder.")]) -> None:
    """Show what a client does; exit code 0 if it noted anything in the last minute."""
    import json

    from choral.errors import Unreachable
    from choral_client.diary import read

    note = read(state)
    typer.echo(json.dumps(note))
    if note["age_s"] > _MAX_SILENCE_S and note["doing"] != "finished":
        raise Unreachable(f"{state}: the client has noted nothing for {note['age_s']} s; is it running?")


@app.command()
def privacy(
    state: Annotated[Path, typer.Option(help="The client's state folder.")],
    delta: Annotated[float | None, typer.Option(min=1e-30, max=0.01, help="The δ that ε is for [the guard's].")] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show how much privacy this device has lost by all that it has ever sent with noise of its own, and what it may lose."""
    from choral.errors import ConfigError

    from choral_deploy.client_privacy import losses_in

    if not state.is_dir():
        raise ConfigError(f"--state: {state} is no folder: give the client's state folder")
    found = losses_in(state, delta)
    if json:
        typer.echo(found.to_json())
    else:
        found.print()


def _named(name: str | None, state: Path | None) -> tuple[Path, str | None]:
    """A client's state folder, and its name as far as it is known."""
    from choral.errors import ConfigError
    from choral.identity import held
    from choral_client.config import folder_of

    if state is None and name is None:
        raise ConfigError("give --name, or --state with the client's state folder")
    folder = state if state is not None else folder_of(name or "")
    enrolled = held(folder)
    if enrolled is not None and name is not None and enrolled.name != name:
        raise ConfigError(f"--name: {folder} holds the identity of {enrolled.name}: give its name, or another folder")
    return folder, name if enrolled is None else enrolled.name


def _config(path: Path | None, flags: dict[str, Any]) -> Any:
    """The configuration from a file and flags; relative paths in the file count from its folder."""
    from choral.config import parse, read_mapping
    from choral_client.config import ClientConfig

    content = read_mapping(path) if path is not None else {}
    home = path.resolve().parent if path is not None else Path()
    for key in ("data", "ca", "certificate", "key", "token", "state", "guard"):
        if isinstance(content.get(key), str):
            content[key] = home / content[key]
    content |= flags
    return parse(content, ClientConfig, str(path) if path is not None else "command line")

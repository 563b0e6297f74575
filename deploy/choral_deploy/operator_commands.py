"""`choral runs|rounds|clients|versions|events`: what operators see and do."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from choral_deploy.where import DEFAULT as _DEFAULT
from choral_deploy.where import WhereOption

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RunOption = Annotated[str, typer.Option("--run", help="Name of the run; the present one if not given.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=2**31 - 1, help="How many, newest first.")]
NumberArgument = Annotated[int, typer.Argument(min=0, max=2**63 - 1)]

runs = typer.Typer(help="See and steer runs.", no_args_is_help=True)
rounds = typer.Typer(help="See rounds, open one now.", no_args_is_help=True)
clients = typer.Typer(help="See clients.", no_args_is_help=True)
versions = typer.Typer(help="See versions of the model.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Offer the commands."""
    for name, group in {"runs": runs, "rounds": rounds, "clients": clients, "versions": versions}.items():
        app.add_typer(group, name=name)
    app.command("events")(list_events)


@runs.command("list")
def list_runs(config: WhereOption = _DEFAULT, json: JsonOption = False) -> None:
    """The runs."""
    columns = {
        "run": lambda run: run.name,
        "task": lambda run: run.task,
        "state": lambda run: _word(run, "state"),
        "rounds": lambda run: f"{run.rounds_done}/{run.rounds_planned}",
        "latest": lambda run: run.latest_version,
        "best": lambda run: run.best_version if run.HasField("best_version") else "",
        "next round": lambda run: _moment(run, "next_round_at"),
        "reason": lambda run: run.reason,
    }
    _table(columns, _call(config, "ListRuns").runs, json)


@runs.command()
def start(
    config: WhereOption = _DEFAULT,
    rounds: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Rounds to train; 0: as configured.")] = 0,
    from_latest: Annotated[bool, typer.Option(help="Continue from the latest version of the run before.")] = False,
) -> None:
    """Start a further run."""
    _say_run(_call(config, "StartRun", rounds=rounds, from_latest=from_latest).run)


@runs.command()
def pause(config: WhereOption = _DEFAULT) -> None:
    """Open no further round until resumed."""
    _say_run(_call(config, "PauseRun").run)


@runs.command()
def resume(config: WhereOption = _DEFAULT) -> None:
    """Go on after a pause or a failure."""
    _say_run(_call(config, "ResumeRun").run)


@runs.command()
def stop(config: WhereOption = _DEFAULT) -> None:
    """End the run; the round under way is abandoned."""
    _say_run(_call(config, "StopRun").run)


@runs.command()
def watch(config: WhereOption = _DEFAULT) -> None:
    """Print every change, one JSON object a line, until interrupted."""
    from choral.v1 import admin_pb2

    from choral_deploy.operator import Operator

    async def follow() -> None:
        async with Operator.at(config).stub() as admin:
            async for change in admin.Watch(admin_pb2.WatchRequest()):
                typer.echo(_json([change])[1:-1])

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with SIGINT ignored
    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@rounds.command("list")
def list_rounds(config: WhereOption = _DEFAULT, run: RunOption = "", limit: LimitOption = 20, json: JsonOption = False) -> None:
    """The rounds of a run."""
    columns = {
        "round": lambda round: round.number,
        "kind": lambda round: _word(round, "kind"),
        "state": lambda round: _word(round, "state"),
        "from version": lambda round: round.version,
        "accepted": lambda round: f"{sum(part.state == 'accepted' for part in round.parts)}/{len(round.parts)}",
        "seconds": lambda round: f"{round.duration_s:.3f}",
        "codec": lambda round: ", ".join(sorted({part.codec for part in round.parts if part.state == "accepted"} - {""})),
        "bytes": lambda round: sum(part.payload_bytes for part in round.parts),
        "reason": lambda round: round.reason,
    }
    _table(columns, _call(config, "ListRounds", run=run, limit=limit).rounds, json)


@rounds.command()
def show(number: NumberArgument, config: WhereOption = _DEFAULT, run: RunOption = "", json: JsonOption = False) -> None:
    """One round, client by client."""
    from choral.errors import ConfigError

    found = _call(config, "ListRounds", run=run, number=number).rounds
    if not found:
        raise ConfigError(f"round {number} is unknown; `choral rounds list` shows those there are")
    columns = {
        "client": lambda part: part.client,
        "state": lambda part: part.state,
        "examples": lambda part: part.examples,
        "codec": lambda part: part.codec,
        "bytes": lambda part: part.payload_bytes or "",
        "work": lambda part: _metrics(part.work),
        "held out": lambda part: _metrics(part.held_out),
        "reason": lambda part: part.reason,
    }
    _table(columns, found[0].parts, json)


@rounds.command()
def trigger(config: WhereOption = _DEFAULT) -> None:
    """Open the next round now, whatever the schedule says."""
    _say_run(_call(config, "TriggerRound").run)


def _whether_attending(client: Any) -> str:
    if client.attending:
        return "yes"
    return f"no, until {_moment(client, 'away_until')}" if client.HasField("away_until") else "no"


@clients.command("list")
def list_clients(config: WhereOption = _DEFAULT, json: JsonOption = False) -> None:
    """Every client that has ever attended."""
    columns = {
        "client": lambda client: client.name,
        "attending": _whether_attending,
        "examples": lambda client: client.examples,
        "accepted": lambda client: client.accepted,
        "refused in a row": lambda client: client.refused,
        "quarantine": lambda client: client.quarantine,
        "software": lambda client: client.software,
        "address": lambda client: client.address,
        "last heard": lambda client: _moment(client, "heard_at"),
        "reason": lambda client: client.reason,
    }
    _table(columns, _call(config, "ListClients").clients, json)


@clients.command()
def quarantine(
    name: str,
    config: WhereOption = _DEFAULT,
    reason: Annotated[str, typer.Option(help="Why; the client's owner is told.")] = "",
) -> None:
    """Ask and take no results from a client until it is released."""
    client = _call(config, "QuarantineClient", client=name, reason=reason).client
    typer.echo(f"client {client.name}: quarantined ({client.quarantine})")


@clients.command()
def release(name: str, config: WhereOption = _DEFAULT) -> None:
    """Let a quarantined client take part again."""
    typer.echo(f"client {_call(config, 'ReleaseClient', client=name).client.name}: released")


@clients.command()
def enrolled(config: WhereOption = _DEFAULT, json: JsonOption = False) -> None:
    """Everybody who has enrolled or was revoked, devices and people."""
    columns = {
        "name": lambda member: member.name,
        "role": lambda member: member.role,
        "state": lambda member: f"revoked {_day(member, 'revoked_at')}" if member.HasField("revoked_at") else "in force",
        "enrolled": lambda member: _day(member, "enrolled_at"),
        "valid until": lambda member: _day(member, "expires_at"),
        "key": lambda member: member.key.hex()[:16],
        "reason": lambda member: member.reason,
    }
    _table(columns, _call(config, "ListMembers").members, json)


@clients.command()
def revoke(
    name: str,
    config: WhereOption = _DEFAULT,
    reason: Annotated[str, typer.Option(help="Why; who is revoked is told.")] = "",
) -> None:
    """Let somebody in no more, device or person: what it has open ends at once, its certificate and unused tokens are void."""
    member = _call(config, "RevokeMember", name=name, reason=reason).member
    typer.echo(f"{member.role} {member.name}: revoked ({member.reason})")


@versions.command("rollback")
def roll_back(number: NumberArgument, config: WhereOption = _DEFAULT) -> None:
    """Publish the weights and optimizer state of an earlier version as the newest; a round under way is abandoned."""
    _say_run(_call(config, "RollBack", version=number).run)
    typer.echo(f"going back to version {number}; `choral versions list` shows the new version that has its weights")


def list_events(
    config: WhereOption = _DEFAULT,
    run: Annotated[str, typer.Option("--run", help="Only of this run.")] = "",
    client: Annotated[str, typer.Option("--client", help="Only of this client.")] = "",
    limit: LimitOption = 20,
    json: JsonOption = False,
) -> None:
    """What happened: results refused, clients quarantined, rounds abandoned, what operators did."""
    columns = {
        "at": lambda event: _moment(event, "at"),
        "what": lambda event: event.what,
        "run": lambda event: event.run,
        "round": lambda event: event.round if event.HasField("round") else "",
        "client": lambda event: event.client,
        "by": lambda event: event.by,
        "told": lambda event: event.told,
    }
    _table(columns, _call(config, "ListEvents", run=run, client=client, limit=limit).events, json)


@versions.command("list")
def list_versions(config: WhereOption = _DEFAULT, run: RunOption = "", limit: LimitOption = 20, json: JsonOption = False) -> None:
    """The versions of a run."""
    columns = {
        "version": lambda version: version.version.number,
        "on the test set": lambda version: _metrics(version.test),
        "on clients": lambda version: _metrics(version.clients),
        "bytes": lambda version: version.version.size_bytes,
        "sha256": lambda version: version.version.digest.hex()[:12],
        "published": lambda version: _moment(version, "published_at"),
        "checkpoint": lambda version: version.checkpoint,
    }
    _table(columns, _call(config, "ListVersions", run=run, limit=limit).versions, json)


def _call(config: Path, method: str, **fields: Any) -> Any:
    from choral_deploy.operator import call  # gRPC takes its time to import

    return call(config, method, **fields)


def _table(columns: dict[str, Callable[[Any], object]], rows: Iterable[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(_json(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from choral_deploy.cells import cell

    table = Table(*columns)
    for row in rows:
        table.add_row(*(cell(read(row)) for read in columns.values()))
    Console().print(table)


def _json(messages: Iterable[Any], indent: int | None = None) -> str:
    """A list of messages, with the names of the contract and with fields that are zero."""
    import json

    from google.protobuf.json_format import MessageToDict

    read = partial(MessageToDict, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps([read(message) for message in messages], indent=indent)


def _say_run(run: Any) -> None:
    typer.echo(f"run {run.name}: {_word(run, 'state')}" + (f" ({run.reason})" if run.reason else ""))


def _word(message: Any, field: str) -> str:
    """The last part of an enum value's name: RUN_STATE_IN_ROUND of field state is "in round"."""
    descriptor = message.DESCRIPTOR.fields_by_name[field].enum_type
    value: str = descriptor.values_by_number[getattr(message, field)].name
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return value.removeprefix(prefix).replace("_", " ").lower()


def _moment(message: Any, field: str) -> str:
    return getattr(message, field).ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC") if message.HasField(field) else ""


def _day(message: Any, field: str) -> str:
    return _moment(message, field)[:10]


def _metrics(metrics: Iterable[Any]) -> str:
    return ", ".join(f"{metric.name} {metric.value:.4g}" for metric in metrics)

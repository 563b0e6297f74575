"""`choral doctor`: why a run is not moving, asked of the coordinator, or of what it needs if there is none."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from choral_deploy.where import DEFAULT, WhereOption


def doctor(
    config: WhereOption = DEFAULT,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say why the run moves, or does not; exit code 0 if nothing is in the way."""
    from choral.errors import Unreachable
    from choral.v1 import admin_pb2

    from choral_deploy.operator import call

    try:
        answer = call(config, "Diagnose")
    except Unreachable as error:
        if config.is_dir():
            raise  # what a coordinator elsewhere needs cannot be looked at from here
        from choral_server.checkup import check_up
        from choral_server.config import load

        findings = asyncio.run(check_up(load(config)))
        told = admin_pb2.Finding(subject="coordinator", good=False, found=str(error), cure="start `choral server`")
        kept = [admin_pb2.Finding(subject=f.subject, good=f.good, found=f.found, cure=f.cure) for f in findings]
        answer = admin_pb2.DiagnoseResponse(moving=False, findings=[told, *kept])
    _show(answer, json)
    if not answer.moving:
        raise typer.Exit(1)


def _show(answer: Any, as_json: bool) -> None:
    if as_json:
        from google.protobuf.json_format import MessageToJson

        typer.echo(MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    from rich.console import Console
    from rich.table import Table

    from choral_deploy.cells import cell

    table = Table("", "what", "found", "what to do")
    for finding in answer.findings:
        words = (finding.subject, finding.found, finding.cure)
        table.add_row("[green]✓[/]" if finding.good else "[red]✗[/]", *map(cell, words))
    Console().print(table)

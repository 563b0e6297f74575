"""`choral privacy`: what noise a promise needs, what has been spent of it, and for how long it is enough."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from choral_deploy.where import DEFAULT as _DEFAULT
from choral_deploy.where import WhereOption

app = typer.Typer(help="Differential privacy: plan a budget, see what is spent.", no_args_is_help=True)


class Drawn(StrEnum):
    """As `choral.privacy.accounting.Sampling`, which takes its time to import."""

    poisson = "poisson"
    fixed = "fixed"
    none = "none"


class Counted(StrEnum):
    """As `choral.privacy.accounting.Accountant`."""

    rdp = "rdp"
    pld = "pld"


class Mode(StrEnum):
    """As run.privacy.mode."""

    central = "central"
    distributed = "distributed"
    local = "local"


@app.command()
def plan(
    clients: Annotated[int, typer.Option(min=1, help="Clients that attend.")],
    cohort: Annotated[int, typer.Option(min=1, help="Clients in a round: run.cohort_size.")],
    rounds: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Rounds; if not given, how many there can be.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget; if not given, what the rounds cost.")] = None,
    noise: Annotated[float | None, typer.Option(help="run.privacy.noise; if not given, how much is needed.")] = None,
    delta: Annotated[float, typer.Option(help="The probability that the promise does not hold.")] = 1e-5,
    sampling: Annotated[Drawn, typer.Option(help="run.privacy.sampling.")] = Drawn.poisson,
    accountant: Annotated[Counted, typer.Option(help="run.privacy.accountant.")] = Counted.rdp,
    mode: Annotated[Mode, typer.Option(help="run.privacy.mode; but for central it needs --sampling none.")] = Mode.central,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """What is missing of three: noise, rounds, and the ε that they cost. Give two of them."""
    from choral_deploy.privacy_plan import Question, answer

    question = Question(clients, cohort, rounds, epsilon, noise, delta, sampling.value, accountant.value, mode.value)
    found = answer(question)
    if json:
        typer.echo(found.to_json())
    else:
        found.print()


@app.command()
def examples(
    count: Annotated[int, typer.Option("--examples", min=1, help="Examples that a client trains on.")],
    rounds: Annotated[int, typer.Option(min=1, max=1_000_000, help="Rounds that it takes part in.")],
    batch_size: Annotated[int, typer.Option(min=1, help="run.training.batch_size.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="run.training.epochs.")] = 1,
    epsilon: Annotated[float | None, typer.Option(help="The budget; if not given, what the rounds cost.")] = None,
    noise: Annotated[float | None, typer.Option(help="run.example_privacy.noise; if not given, how much is needed.")] = None,
    delta: Annotated[float, typer.Option(help="The probability that the promise does not hold.")] = 1e-5,
    statistics: Annotated[bool, typer.Option(help="The task standardises features: one round is for their statistics.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """What hiding each single example of a client costs (run.example_privacy): the noise for an ε, or the ε of a noise."""
    from choral_deploy.example_plan import answer

    found = answer(count, rounds, batch_size, epochs, epsilon, noise, delta, statistics=statistics)
    if json:
        typer.echo(found.to_json())
    else:
        found.print()


class Source(StrEnum):
    """Where the audited noise comes from."""

    gaussian = "gaussian"
    discrete = "discrete"
    skellam = "skellam"
    local = "local"
    none = "none"


def audit(
    noise: Annotated[float, typer.Option(min=0.05, max=10_000, help="As run.privacy.noise.")],
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Rounds, in which everybody takes part.")] = 1,
    canaries: Annotated[int, typer.Option(min=20, max=100_000, help="Clients that are there or not by the toss of a coin.")] = 1000,
    delta: Annotated[float, typer.Option(help="The probability that the promise does not hold.")] = 1e-5,
    confidence: Annotated[float, typer.Option(help="How sure the bound is to be.")] = 0.99,
    source: Annotated[
        Source, typer.Option(help="The coordinator's: gaussian, discrete; devices': skellam (summed), local; none is found out.")
    ] = Source.gaussian,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Try to find who took part in what is released; a broken promise is an error.

    It looks at clipping, the sum and the noise, as they are made; not at how cohorts are drawn, nor at metrics.
    """
    from choral_deploy.privacy_audit import audit as run

    found = run(canaries, rounds, noise, delta, confidence, source.value)
    if json:
        typer.echo(found.to_json())
    else:
        found.print()
    if not found.holds:
        raise typer.Exit(1)


def show(
    config: WhereOption = _DEFAULT,
    run: Annotated[str, typer.Option("--run", help="Only of this run.")] = "",
    client: Annotated[str, typer.Option("--client", help="Only rounds in which a result of this client counts.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="How many rounds, newest first.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What rounds have cost, and what is left of the budget."""
    from choral_deploy.operator import call

    answer = call(config, "ListSpendings", run=run, client=client, limit=limit)
    if json:
        _print_json(answer)
        return
    _print_table(answer)
    if answer.HasField("budget"):
        budget = answer.budget
        typer.echo(
            f"spent ε {budget.epsilon_models:.4g} of {budget.epsilon:g} at δ {budget.delta:g}; "
            f"{budget.epsilon_coordinator:.4g} for whoever knows who was drawn; {budget.rounds_left} more rounds at least"
        )
    if answer.HasField("epsilon_client"):
        typer.echo(f"{client} has lost ε {answer.epsilon_client:.4g} to whoever knows when it took part")


def charge(
    rounds: Annotated[int, typer.Argument(min=1, max=1_000_000, help="How many; versions that clients have and this has not.")],
    config: WhereOption = _DEFAULT,
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")] = "",
) -> None:
    """Count private rounds that were made and are not known any more: after a backup was restored, or with another coordinator."""
    from choral_deploy.operator import call

    one = call(config, "ChargePrivacy", rounds=rounds, reason=reason).spending
    typer.echo(f"charged {one.rounds} rounds: ε is {one.epsilon_models:.4g} at δ {one.delta:g}")


def _print_json(answer: Any) -> None:
    import json

    from google.protobuf.json_format import MessageToDict

    told = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    typer.echo(json.dumps(told, indent=1))


def _print_table(answer: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from choral_deploy.cells import cell

    table = Table("run", "round", "state", "noise", "clip", "drawn", "ε", "ε, draw known")
    for one in answer.spendings:
        drawn = f"{one.expected} of {one.population}" + (f", {one.sampling}" if one.sampling != "none" else "")
        number = str(one.round) if one.round >= 0 else f"{one.rounds} charged"
        told = one.state, f"{one.noise:.4g}", f"{one.clip:.4g}", drawn
        table.add_row(cell(one.run), number, *told, f"{one.epsilon_models:.4g}", f"{one.epsilon_coordinator:.4g}")
    Console().print(table)

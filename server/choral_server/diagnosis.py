"""Why the run moves, or does not: what `choral doctor` says of a coordinator that runs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from choral_server.records import OVER, ClientRecord, RunRecord, RunState
from choral_server.rounds import AT_WORK, PartState, Round, RoundState, outstanding

_CURES = {
    "database": "start the database, or make it reachable from here; the coordinator goes on by itself",
    "disk": "make room; the coordinator goes on by itself",
    "artifacts": "make the object store reachable from here; the coordinator goes on by itself",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: whether it is as it should be, what was found, and what to do."""

    subject: str
    good: bool
    found: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Condition:
    """What there is to look at. `needed` clients must be eligible before a round opens."""

    run: RunRecord
    current: Round | None
    clients: Mapping[str, ClientRecord]
    present: Sequence[str]
    needed: int
    troubles: Mapping[str, str]


def diagnose(condition: Condition) -> list[Finding]:
    """What is in the way, and what is not."""
    return [*_run(condition), *_clients(condition), *_round(condition), *_troubles(condition)]


def moving(findings: Sequence[Finding]) -> bool:
    """Whether nothing is in the way."""
    return all(finding.good for finding in findings)


def _run(condition: Condition) -> Iterator[Finding]:
    run = condition.run
    done = f"run {run.name}: {run.rounds_done} of {run.rounds_planned} rounds done"
    if run.state in OVER:
        yield Finding("run", True, f"{done}; it is over: {run.reason}")
    elif run.state is RunState.FAILED:
        yield Finding("run", False, f"{done}; it failed: {run.reason}", "mend that, then `choral runs resume`")
    elif run.paused:
        yield Finding("run", False, f"{done}; paused by an operator", "`choral runs resume`")
    else:
        yield Finding("run", True, f"{done}; {run.state.value}")
        if run.next_round_at is not None and not condition.troubles:
            when = run.next_round_at.strftime("%Y-%m-%d %H:%M:%S %Z")
            yield Finding("schedule", True, f"{run.reason}: at {when}; `choral rounds trigger` opens it now")


def _clients(condition: Condition) -> Iterator[Finding]:
    run, clients = condition.run, condition.clients
    eligible = [name for name in condition.present if not clients[name].quarantine]
    quarantined = sorted(name for name, client in clients.items() if client.quarantine)
    away = sorted(name for name, client in clients.items() if name not in condition.present and not client.quarantine)
    waiting = run.state is RunState.WAITING
    enough = len(eligible) >= condition.needed or not waiting
    found = f"{len(eligible)} eligible clients attend, {condition.needed} are needed to open a round"
    told = f"; known but away: {', '.join(away)}" if away else ""
    cure = f"start {condition.needed - len(eligible)} more" if not enough else ""
    if quarantined and not enough:
        cure += f", or `choral clients release` one of {', '.join(quarantined)}"
    yield Finding("clients", enough, found + told, cure)
    for name in quarantined:
        yield Finding(
            "quarantine", enough, f"{name}: {clients[name].quarantine}", f"look at it, then `choral clients release {name}`"
        )


def _round(condition: Condition) -> Iterator[Finding]:
    current = condition.current
    if current is None or current.state is not RoundState.OPEN:
        return
    accepted = current.count(PartState.ACCEPTED)
    at_work = current.count(*AT_WORK)
    possible = accepted + at_work >= current.quorum
    found = f"round {current.number}: {accepted} results of {current.goal}, {current.quorum} are the least"
    found += f"; still out: {outstanding(current)}"
    cure = "" if possible else "start the clients that are absent; otherwise the deadline ends the round"
    yield Finding("round", possible, found, cure)


def _troubles(condition: Condition) -> Iterator[Finding]:
    for subject in ("disk", "database", "artifacts"):
        reason = condition.troubles.get(subject)
        yield Finding(subject, reason is None, reason or "works", _CURES[subject] if reason else "")

"""What a commit tells the history: from records to facts, as they are stored. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC
from typing import Any

from choral import __version__

from choral_server.config import ServerConfig
from choral_server.history import BEGUN, KEY, KEY_REPLACED, Facts, Telling
from choral_server.records import EventRecord, Origin, Record, RunRecord, SpendingRecord, SpendingState, VersionRecord
from choral_server.rounds import ENDED, PartState, Round, RoundState
from choral_server.tables import storable

ROUND, VERSION, EVENT, CONFIGURATION, PRIVACY = "round ended", "version published", "event", "configuration", "privacy spent"


def told_by(records: Iterable[Record], runs: Mapping[str, RunRecord]) -> Iterator[Telling]:
    """What the records of one commit tell; `runs` as they were before it.

    A version is told of once, when it is published, and behind the round that made it.
    """
    told = tuple(records)
    rounds = [record for record in told if isinstance(record, Round) and record.state in ENDED]
    versions = [record for record in told if isinstance(record, VersionRecord) and _is_new(record, runs)]
    for event in told:
        if isinstance(event, EventRecord):
            yield EVENT, event_facts(event)
    for spending in told:  # what is spent was told when it was set aside, but for what an operator charged
        if isinstance(spending, SpendingRecord) and (spending.state is not SpendingState.SPENT or spending.round < 0):
            yield PRIVACY, spending_facts(spending)
    for round in rounds:
        yield ROUND, round_facts(round, next((version for version in versions if _made(round, version)), None))
    for version in versions:
        yield VERSION, version_facts(version, next((round.number for round in rounds if _made(round, version)), None))


def event_facts(event: EventRecord) -> Facts:
    """An event, whole."""
    words = {"id": event.id, "what": event.what, "told": event.told, "run": event.run, "client": event.client, "by": event.by}
    stored = {name: storable(word) for name, word in words.items()}
    return stored | {"at": event.at.astimezone(UTC).isoformat(), "round": event.round}


def round_facts(round: Round, child: VersionRecord | None = None) -> Facts:
    """A round that has ended: what was asked, of how many, what came of it, and whose result was refused."""
    refused = [part for part in round.parts.values() if part.state is PartState.REFUSED]
    return {
        "run": storable(round.run),
        "round": round.number,
        "kind": round.kind.value,
        "outcome": round.state.value,
        "reason": storable(round.reason),
        "plan": round.plan.hex(),
        "goal": round.goal,
        "quorum": round.quorum,
        "asked": len(round.parts),
        "accepted": round.count(PartState.ACCEPTED),
        "refused": [{"client": storable(part.client), "reason": storable(part.reason)} for part in refused],
        "parent": {"number": round.version, "digest": round.parent.hex()},
        "child": {"number": child.version.number, "digest": child.version.digest.hex()} if child is not None else None,
    }


def spending_facts(spending: SpendingRecord) -> Facts:
    """What is set aside for a round, or comes back from one that was abandoned."""
    release = spending.release
    return {
        "run": storable(spending.run),
        "round": spending.round,
        "kind": spending.kind.value,
        "state": spending.state.value,
        "rounds": spending.rounds,
        "noise": release.noise,
        "mode": spending.mode,
        "clip": spending.clip,
        "sampling": release.sampling.value,
        "expected": release.expected,
        "population": release.population,
        "delta": spending.delta,
        "epsilon_models": spending.epsilon_models,
        "epsilon_coordinator": spending.epsilon_coordinator,
    }


def version_facts(record: VersionRecord, made_in: int | None = None) -> Facts:
    """A version, and what it was made from."""
    version = record.version
    facts = {"run": storable(record.run), "number": version.number, "digest": version.digest.hex(), "bytes": version.size_bytes}
    return facts | {"round": made_in, "parent": _origin_facts(record.parent)}


def configuration(config: ServerConfig, database: str) -> dict[str, Any]:
    """The configuration by dotted key, and the release; `database` is its URL as people may see it, without password."""
    content = config.model_copy(update={"database": database}).model_dump(mode="json", warnings=False)
    return {"release": __version__} | dict(_flat("", content))


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def found_before(runs: Iterable[RunRecord], last_event: int | None) -> Facts:
    """What there is when the history begins, in a database of an earlier release: of that it tells nothing more."""
    found = {run.name: {"latest": run.latest, "rounds": run.next_round} for run in runs}
    return {"runs": found, "events": last_event} if found or last_event is not None else {}


def configuration_facts(before: Facts | None, values: Mapping[str, Any]) -> Facts | None:
    """The configuration by key, and what changed since it was last told (None: never); None: nothing did."""
    if before is None:
        return {"values": values, "changed": {}}
    old = before["values"]
    keys = sorted({*old, *values})
    changed = {key: [old.get(key), values.get(key)] for key in keys if old.get(key) != values.get(key)}
    return {"values": values, "changed": changed} if changed else None


def _origin_facts(origin: Origin | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    return {"run": storable(origin.run), "number": origin.number, "digest": origin.digest.hex()}


def _is_new(version: VersionRecord, runs: Mapping[str, RunRecord]) -> bool:
    known = runs.get(version.run)
    return known is None or version.version.number > known.latest


def _made(round: Round, version: VersionRecord) -> bool:
    """Whether the version, published in the same commit, came out of the round."""
    parent = version.parent
    if parent is None or round.state is not RoundState.DONE:
        return False
    return (round.run, round.run, round.version) == (version.run, parent.run, parent.number)


def in_words(what: str, facts: Facts) -> str:
    """What an entry tells, for people."""
    try:
        return _WORDS[what](facts) if what in _WORDS else ""
    except (KeyError, TypeError, AttributeError, ValueError):
        return "its facts are not as they were written"


def _begun_in_words(facts: Facts) -> str:
    runs = facts["found"].get("runs", {})
    there = f"; there were already {', '.join(runs)}" if runs else ""
    return f"signed with key {facts[KEY][:16]}{there}"


def _round_in_words(facts: Facts) -> str:
    child, why = facts["child"], f" ({facts['reason']})" if facts["reason"] else ""
    made = f", made version {child['number']}" if child is not None else ""
    refused = "".join(f"; {part['client']} refused: {part['reason']}" for part in facts["refused"])
    counts = f"{facts['accepted']} accepted of {facts['asked']} asked"
    return (
        f"run {facts['run']}: {facts['kind']} round {facts['round']} {facts['outcome']}{why}: {counts}, "
        f"from version {facts['parent']['number']}{made}, plan {facts['plan'][:16]}{refused}"
    )


def _version_in_words(facts: Facts) -> str:
    parent = facts["parent"]
    origin = f" of run {parent['run']}" if parent is not None and parent["run"] != facts["run"] else ""
    made = f", from version {parent['number']}{origin}" if parent is not None else ""
    made += f" by round {facts['round']}" if facts["round"] is not None else ""
    return f"run {facts['run']}: version {facts['number']} (SHA-256 {facts['digest'][:16]}){made}"


def _event_in_words(facts: Facts) -> str:
    about = [f"run {facts['run']}"] if facts["run"] else []
    about += [f"round {facts['round']}"] if facts["round"] is not None else []
    about += [f"client {facts['client']}"] if facts["client"] else []
    by = f"by {facts['by']}" if facts.get("by") else ""
    return ": ".join(filter(None, (", ".join(about), facts["what"], facts["told"], by)))


def _spending_in_words(facts: Facts) -> str:
    drawn = f"{facts['expected']} of {facts['population']} clients, sampling {facts['sampling']}"
    return (
        f"run {facts['run']}: {facts['state']} for {_which(facts)}: {facts['mode']} noise {facts['noise']:g} of clip "
        f"{facts['clip']:g}, {drawn}; ε {facts['epsilon_models']:.4g} (who was drawn known: {facts['epsilon_coordinator']:.4g}) "
        f"at δ {facts['delta']:g}"
    )


def _which(facts: Facts) -> str:
    return f"{facts['kind']} round {facts['round']}" if facts["round"] >= 0 else f"{facts['rounds']} rounds that are not known here"


def _configuration_in_words(facts: Facts) -> str:
    changed = [f"{key}: {before!r} → {now!r}" for key, (before, now) in facts["changed"].items()]
    return "; ".join(changed) or f"as first told, {len(facts['values'])} keys"


_WORDS: Mapping[str, Callable[[Facts], str]] = {
    BEGUN: _begun_in_words,
    KEY_REPLACED: lambda facts: f"signed with key {facts[KEY][:16]} from here on: the one before was lost, or was another",
    ROUND: _round_in_words,
    VERSION: _version_in_words,
    EVENT: _event_in_words,
    CONFIGURATION: _configuration_in_words,
    PRIVACY: _spending_in_words,
}

"""What the end of its part says of a client: a result that counts, one that is refused, and one too many. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime

from choral_server.records import ClientRecord, EventRecord
from choral_server.rounds import Part, PartState, Round, RoundState

_NOTED = {PartState.REFUSED: "result refused", PartState.DECLINED: "client declined"}


def consequences(
    round: Round, ended: Iterable[Part], clients: Mapping[str, ClientRecord], quarantine_after: int | None, now: datetime
) -> Iterator[ClientRecord | EventRecord]:
    """What is to be kept of parts that `ended`, besides themselves; `quarantine_after` results refused in a row (None: never)."""
    if round.state is RoundState.ABANDONED:
        yield EventRecord(now, "round abandoned", round.reason, round.run, round.number)
    for part in ended:
        client = clients.get(part.client)
        if part.state in _NOTED:
            yield EventRecord(now, _NOTED[part.state], part.reason, round.run, round.number, part.client)
        if client is None:
            continue
        if part.state is PartState.ACCEPTED:
            told = part.examples or client.examples  # a masked result does not say how many
            yield replace(client, accepted=client.accepted + 1, refused=0, examples=told)
        elif part.state is PartState.REFUSED:
            after = replace(client, refused=client.refused + 1)
            if quarantine_after is not None and after.refused >= quarantine_after and not after.quarantine:
                why = f"{after.refused} results in a row were refused, the last because {part.reason}"
                after = replace(after, quarantine=why)
                yield EventRecord(now, "client quarantined", why, round.run, round.number, part.client)
            yield after


def release(client: ClientRecord) -> ClientRecord:
    """The client as it is once it is trusted again."""
    return replace(client, quarantine="", refused=0)

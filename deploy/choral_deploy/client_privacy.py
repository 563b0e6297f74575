"""What a device has lost of its privacy, as `choral client privacy` shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from choral_client.guard_file import GuardFile
from choral_client.privacy_book import CLIENT, EXAMPLE, PrivacyBook

_WHAT = {CLIENT: "all of this client's data together", EXAMPLE: "a single example"}


@dataclass(frozen=True)
class Lost:
    """ε of so many `results` that hide the same; `allowed` by the device's owner, None: any."""

    results: int
    epsilon: float
    allowed: float | None


@dataclass(frozen=True)
class Losses:
    """By what is hidden."""

    client: Lost
    example: Lost
    delta: float

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))

    def print(self) -> None:
        """For people."""
        from rich.console import Console
        from rich.table import Table

        table = Table("what noise hides", "results", f"ε at δ {self.delta:g}", "allowed")
        for hidden, lost in ((CLIENT, self.client), (EXAMPLE, self.example)):
            allowed = "any" if lost.allowed is None else f"{lost.allowed:g}"
            table.add_row(_WHAT[hidden], str(lost.results), f"{lost.epsilon:.4g}", allowed)
        Console().print(table)


def losses_in(state: Path, delta: float | None) -> Losses:
    """Of the client with this state folder; at the guard's δ, if none is given. Raises Declined: they cannot be read."""
    book, guard = PrivacyBook(state), GuardFile(state).current()
    at = guard.delta if delta is None else delta

    def lost(hidden: str, allowed: float | None) -> Lost:
        count = sum(loss.hidden == hidden for loss in book.losses())
        return Lost(count, book.epsilon(hidden, at) if count else 0.0, allowed)

    return Losses(lost(CLIENT, guard.max_epsilon), lost(EXAMPLE, guard.max_example_epsilon), at)

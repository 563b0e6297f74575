"""In which rounds this client has revealed what it held of others' secrets: in a file that outlives it, since it may do so once."""

from __future__ import annotations

import json
from pathlib import Path

from choral.durable import write_durably
from choral.errors import Deceived, Declined
from choral.secagg.roster import Terms


class Spent:
    """The newest round of each run, in spent.json. May be used from one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "spent.json"

    def check(self, terms: Terms) -> None:
        """Raises Deceived: the round, or a later one, has been revealed; Declined: that cannot be known."""
        if (newest := self._read().get(terms.run, -1)) >= terms.round:
            raise Deceived(
                f"this client has revealed what it held in round {newest} of run {terms.run}, and takes no part in round "
                f"{terms.round} of it any more: the sums of two attempts differ by whoever is in one of them alone"
            )

    def spend(self, terms: Terms) -> None:
        """Keep, for good, that the round is revealed. Raises as `check`, and Declined: it cannot be kept."""
        self.check(terms)
        content = json.dumps(self._read() | {terms.run: terms.round}).encode()
        try:
            write_durably(self._path, content)
        except OSError as error:
            raise Declined(f"{self._path} cannot be written ({error.strerror}), so nothing is revealed: make room there") from error

    def _read(self) -> dict[str, int]:
        try:
            read = json.loads(self._path.read_bytes())
            return {str(run): int(number) for run, number in read.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
            raise Declined(
                f"{self._path} says in which rounds this client has revealed what it held, and cannot be read ({error}): restore "
                "it, or remove it if it is certain that no coordinator repeats a round"
            ) from error

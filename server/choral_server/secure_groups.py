"""The secure sums of a round's groups, each led by itself and side by side; of one group, if the configuration asks for no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
from choral.errors import UpdateRefused
from choral.sum_messages import FromSummand, SumAdvert

from choral_server import cohort
from choral_server.rounds import Part
from choral_server.secure_sum import SecureSum

log = structlog.get_logger()
_NAMED = 10  # clients named in a reason
Make = Callable[[int, Callable[[], None], Callable[[str], None]], SecureSum]
"""The secure sum of a group, which calls the first when it is done, and the second, with the reason, when it came to nothing."""


class SecureGroups:
    """Divides the clients that are ready into `count` groups, and leads a secure sum in each.

    More than half of the groups must come to something, and with them `quorum` results: then `done(groups)` is called with those
    groups; or `failed(reason)`. Before that, `lost(clients, reason)` is called for each group that comes to nothing, as soon as it
    does: its clients wait in vain. `order` names what decides who is in which group.
    """

    def __init__(
        self,
        count: int,
        make: Make,
        order: str,
        quorum: int,
        done: Callable[[Sequence[int]], None],
        failed: Callable[[str], None],
        lost: Callable[[Sequence[str], str], None],
    ) -> None:
        self._sums = [make(group, self._is_good(group), self._is_lost(group)) for group in range(count)]
        self._order = order
        self._quorum = quorum
        self._done = done
        self._failed = failed
        self._lost = lost
        self._open = set(range(count))
        self._good: list[int] = []
        self._faults: list[str] = []
        self.groups: dict[str, int] = {}

    def enter(self, said: SumAdvert) -> None:
        """A client is ready. Raises UpdateRefused."""
        if self.groups:
            self._of(said.advert.client).enter(said)
        else:
            for each in self._sums:
                each.enter(said)

    def divide(self, parts: Sequence[Part]) -> None:
        """Say who is in which group."""
        self.groups = cohort.dealt(self._order, (part.client for part in parts), len(self._sums))

    def begin(self, parts: Sequence[Part]) -> None:
        """With these, which were divided."""
        for group, each in enumerate(self._sums):
            each.begin([part for part in parts if self.groups[part.client] == group])

    def take(self, client: str, said: FromSummand) -> None:
        """What a client says in its sum. Raises UpdateRefused."""
        self._of(client).take(client, said)

    def expects(self, client: str) -> None:
        """Whether a client's masked result can be taken now. Raises UpdateRefused."""
        self._of(client).expects(client)

    def taking(self, client: str) -> None:
        """A client's masked result has arrived, and is being stored. Raises UpdateRefused."""
        self._of(client).taking(client)

    def not_taken(self, client: str) -> None:
        """It was not, after all."""
        if client in self.groups:
            self._of(client).not_taken(client)

    def sent(self, client: str) -> None:
        """A client's masked result is in its sum."""
        self._of(client).sent(client)

    def lost(self, client: str) -> None:
        """A client does not go on."""
        if client in self.groups:
            self._of(client).lost(client)

    def remind(self, client: str) -> None:
        """A client was away."""
        if client in self.groups:
            self._of(client).remind(client)

    def end(self) -> None:
        """Wait for nothing more."""
        for each in self._sums:
            each.end()

    def _of(self, client: str) -> SecureSum:
        if client not in self.groups:
            raise UpdateRefused(f"{client} takes no part in a secure sum now: it begins when enough clients are ready, with those")
        return self._sums[self.groups[client]]

    def _is_good(self, group: int) -> Callable[[], None]:
        def good() -> None:
            self._good.append(group)
            self._over(group)

        return good

    def _is_lost(self, group: int) -> Callable[[str], None]:
        def lost(reason: str) -> None:
            clients = sorted(client for client, of in self.groups.items() if of == group)
            self._faults.append(reason if len(self._sums) == 1 else f"the group of {_named(clients)}: {reason}")
            self._lost(clients, self._faults[-1])
            self._over(group)

        return lost

    def _over(self, group: int) -> None:
        """One of the groups is; once all are, the round is."""
        self._open.discard(group)
        if self._open:
            return
        results = sum(self._sums[good].results for good in self._good)
        if 2 * len(self._good) <= len(self._sums):
            self._failed("; ".join(self._faults))
        elif results < self._quorum:
            told = f"the groups that came to something have {results} results; the quorum is {self._quorum}"
            self._failed("; ".join([told, *self._faults]))
        else:
            self._done(sorted(self._good))


def _named(clients: Sequence[str]) -> str:
    more = f" and {len(clients) - _NAMED} more" if len(clients) > _NAMED else ""
    return ", ".join(clients[:_NAMED]) + more

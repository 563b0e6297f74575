"""This client's parts in secure sums: one at a time, each with what this device asks and who it says it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from choral.errors import Deceived, Declined
from choral.messages import Assignment
from choral.plan import digest_of
from choral.secagg.roster import Advert, Signer, Terms, Vouch
from choral.sum_messages import FromSummand, ToSummand

from choral_client.contribution import check_terms
from choral_client.masking import Masking
from choral_client.oversight import Oversight
from choral_client.spent import Spent
from choral_client.sum_part import SumPart


class Sums:
    """Of the client of that name, with its state in `folder`; `say` tells the coordinator.

    `signer` is asked for each sum, and `vouch` knows the others' keys.
    """

    def __init__(
        self,
        client: str,
        folder: Path,
        oversight: Oversight,
        signer: Callable[[], Signer] | None,
        vouch: Vouch | None,
        say: Callable[[FromSummand], Awaitable[None]],
    ) -> None:
        self._client = client
        self._oversight = oversight
        self._signer = signer
        self._vouch = vouch or _nobody_is_known
        self._say = say
        self._spent = Spent(folder)
        self._part: SumPart | None = None  # under way, or the last one, whose last word may be asked for again

    def part(self, assignment: Assignment) -> SumPart:
        """A part in the sum of an assignment, before its work is done. Reads files.

        Raises Declined: nobody could tell that it is this client, these terms make no sum, the guard says no, or the round
        has been revealed before.
        """
        secure, version = assignment.plan.secure, assignment.version.digest
        assert secure is not None, "what is not summed securely has no part here"
        if self._signer is None:
            raise Declined("this client has no signing key, without which it takes part in no secure sum: enrol it")
        check_terms(secure)
        terms = Terms(secure.run, assignment.round, version, digest_of(assignment.plan), secure.threshold)
        self._spent.check(terms)
        floor = self._oversight.admit(assignment.plan).floor(secure)
        masking = Masking(terms, self._client, self._signer(), self._vouch, floor, self._spent.spend)
        return SumPart(assignment.id, terms, masking, self._say)

    def begin(self, part: SumPart) -> None:
        """From now on, what is said in this sum is for that part."""
        self._part = part

    def leave(self) -> None:
        """Nothing more is said."""
        self._part = None

    async def hear(self, message: ToSummand) -> None:
        """The coordinator says something in a sum. Raises Declined: this client is not in it, or not any more."""
        if self._part is None or self._part.assignment != message.assignment:
            raise Declined("this client has no keys for the secure sum any more: it was started again, or has left the sum")
        await self._part.hear(message)

    async def repeat(self, assignment: str) -> None:
        """Say the last word in the sum of an assignment again, if there is one."""
        if self._part is not None and self._part.assignment == assignment:
            await self._part.repeat()


def _nobody_is_known(said: Advert) -> None:
    raise Deceived(f"this client does not know whether the key that {said.client} shows is its own: enrol it, or pin that key")

"""The accepted results of a round, added up: from the spool into the sum, and now and then the sum to the disk."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from choral_server import failpoints
from choral_server.aggregate import WeightedSum
from choral_server.failpoints import Step
from choral_server.offload import offload
from choral_server.private_sum import PrivateSum
from choral_server.rounds import Part
from choral_server.run import Aggregate, Masked
from choral_server.spool import DISK, RoundSpool
from choral_server.troubles import Troubles

log = structlog.get_logger()


class Tally:
    """Adds results of `result_bytes` each to `aggregate`; afterwards up to `spool_bytes` of them stay on the disk."""

    def __init__(self, aggregate: Aggregate, spool: RoundSpool, result_bytes: int, spool_bytes: int, troubles: Troubles) -> None:
        self.aggregate = aggregate
        self._spool = spool
        self._result_bytes = result_bytes
        self._spool_bytes = spool_bytes
        self._troubles = troubles
        self._kept: list[Part] = []  # what the sum holds but not yet its copy on the disk

    async def restore(self, accepted: Iterable[Part]) -> list[Part]:
        """Add again what an earlier process had accepted: what is in the sum that it left, and the rest from the spool.

        Returns those of which nothing is left, or only damaged: a power cut may take what was not durable.
        """
        if isinstance(self.aggregate, Masked):  # what is left was masked for a sum whose keys are gone
            gone = list(accepted)
            self._spool.drop(gone)
            return gone
        contained: frozenset[str] = frozenset()
        if isinstance(self.aggregate, WeightedSum | PrivateSum) and self._spool.sum_path.exists():
            try:
                await offload(2 * self._result_bytes, self.aggregate.load, self._spool.sum_path)
            except ValueError as error:
                log.warning("sum not used", reason=str(error))
            contained = self.aggregate.contained
        lost = []
        for part in accepted:
            if part.assignment in contained:
                self._spool.drop([part])
            elif await self._spool.holds(part, self._result_bytes):
                await self.add(part)
            else:
                self._spool.lose(part)
                lost.append(part)
        return lost

    async def add(self, part: Part) -> None:
        """Add one accepted result. A disk that does not take the sum is among the troubles; the result stays until it does."""
        if self.aggregate is None:
            return
        await offload(self._result_bytes, self.aggregate.fold, part, self._spool.path(part.client, part.digest))
        failpoints.reach(Step.UPLOAD_FOLDED.value)
        if isinstance(self.aggregate, Masked):  # of which a restart could make nothing
            self._spool.drop([part])
            return
        self._kept.append(part)
        if isinstance(self.aggregate, WeightedSum | PrivateSum) and len(self._kept) * self._result_bytes > self._spool_bytes:
            await self._save(self.aggregate)

    async def _save(self, aggregate: WeightedSum | PrivateSum) -> None:
        try:
            await offload(2 * self._result_bytes, aggregate.save, self._spool.sum_path)
        except OSError as error:
            self._troubles.found(DISK, f"{self._spool.sum_path} cannot be written ({error.strerror})")
            return
        failpoints.reach(Step.SUM_WRITTEN.value)
        self._spool.drop(self._kept)
        self._kept.clear()
        failpoints.reach(Step.SUM_CONTAINED_DELETED.value)

"""The secure sums of one round, made of its plan: what their clients must have signed, and what each sum goes by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import structlog
from choral.codecs import MASKED
from choral.plan import digest_of
from choral.secagg.roster import Terms, Vouch
from choral.sum_messages import ToSummand

from choral_server.grouped_sum import GroupedSum
from choral_server.offload import offload
from choral_server.rounds import Round
from choral_server.run import Masked, Run
from choral_server.secure_groups import SecureGroups
from choral_server.secure_sum import SecureSum
from choral_server.unmasking import Unmasking

log = structlog.get_logger()


def secure_groups(
    run: Run,
    round: Round,
    aggregate: Masked,
    vouch: Vouch,
    longest_s: float,
    say: Callable[[str, ToSummand], None],
    advancing: Callable[[], Collection[str]],
    summed: Callable[[], None],
    failed: Callable[[str], None],
    lost: Callable[[Sequence[str], str], None],
) -> SecureGroups:
    """Lead the round's clients through a secure sum, or one for each group, into `aggregate`; then `summed()`, or `failed(reason)`.

    The rest is as in `SecureSum` and `SecureGroups`.
    """
    plan, settings = run.plan(round.kind, run.asked(round), 0), run.settings.secure_aggregation
    assert plan.secure is not None, "or there would be no masked sum"
    assert settings is not None, "nor without these"
    terms = Terms(plan.secure.run, round.number, round.parent, digest_of(plan), plan.secure.threshold)
    least, step_s, size_bytes = plan.secure.least_clients, settings.step_s, run.payload_bytes(round.kind, MASKED).most
    sums = aggregate.sums if isinstance(aggregate, GroupedSum) else [aggregate]

    def make(group: int, done: Callable[[], None], came_to_nothing: Callable[[str], None]) -> SecureSum:
        quorum = round.quorum if len(sums) == 1 else least
        return SecureSum(
            Unmasking(terms, vouch, least),
            quorum,
            step_s,
            longest_s,
            say,
            advancing,
            lambda mask: offload(size_bytes, sums[group].unmask, mask),
            done,
            came_to_nothing,
        )

    def good(groups: Sequence[int]) -> None:
        if isinstance(aggregate, GroupedSum):
            aggregate.close(groups)
        if aggregate.clipped:
            log.warning("updates clipped", round=round.number, clients=aggregate.clipped)
        summed()

    order = f"{run.settings.seed}/{round.number}/group"
    return SecureGroups(len(sums), make, order, round.quorum, good, failed, lost)

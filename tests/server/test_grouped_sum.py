"""The median over several groups' sums: whose result is in which, what a group that is left out changes, what a lie comes to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from choral.metrics import Metric
from choral.plan import SecurePlan
from choral.secagg import summand
from choral.secagg.fixed_point import fixed_point
from choral.secagg.masks import Mask
from choral.secagg.summand import Layout, Summand
from choral_server.grouped_sum import GroupedSum
from choral_server.masked_sum import BadSum, MaskedSum
from choral_server.parts import Part, PartState
from choral_server.spool import RoundSpool
from choral_server.tally import Tally
from choral_server.troubles import Troubles

CAP, CLIP = 8, 16.0
SCALE = fixed_point(9, CLIP)
PLAN = SecurePlan("run", 2, 9, 0.0, CLIP, SCALE.fraction_bits, 32, CAP)
LAYOUT = Layout(2, 32, (summand.CLIENTS, summand.CLIPPED, summand.WEIGHT, *summand.metric_sums("loss")))
NOTHING = [bytes(16)]
STEP = 2.0**-SCALE.fraction_bits
Said = tuple[str, int, Sequence[float]]  # the group's letter and the client's number, its examples, its update


def none() -> Mask:
    """The masks of everybody, which cancel."""
    return Mask(NOTHING, NOTHING)


def result(folder: Path, examples: int, update: Sequence[float], loss: float = 0.0, clipped: bool = False) -> Path:
    """What a client sends, in a file."""
    values = {summand.CLIENTS: 1.0, summand.CLIPPED: float(clipped), summand.WEIGHT: float(examples)}
    values |= summand.measured((Metric("loss", loss, examples),), CAP)
    sent = Summand(SCALE.encode(np.array(update), examples / CAP), LAYOUT.numbers(values))
    path = folder / "result"
    path.write_bytes(b"".join(sent.pieces()))
    return path


def summed(folder: Path, groups: Mapping[str, int], said: Sequence[Said]) -> GroupedSum:
    """All results in the sums of their clients' groups, masks not yet taken off."""
    sums = [MaskedSum(LAYOUT, SCALE, PLAN, ("loss",)) for _ in range(max(groups.values()) + 1)]
    grouped = GroupedSum(sums)
    grouped.divide(groups)
    for client, examples, update in said:
        grouped.fold(Part(f"run/0/{client}", client), result(folder, examples, update, loss=examples / 10))
    return grouped


def means(folder: Path, said: Sequence[Said], good: Sequence[int]) -> GroupedSum:
    """Groups a, b, c …, of which these are good."""
    grouped = summed(folder, {client: ord(client[0]) - ord("a") for client, *_ in said}, said)
    for group in good:
        grouped.sums[group].unmask(none())
    grouped.close(good)
    return grouped


HONEST: list[Said] = [
    ("a1", 1, [1.0, 0.0]),
    ("a2", 3, [2.0, 4.0]),  # the mean of a: 1.75, 3
    ("b1", 2, [2.0, 1.0]),
    ("b2", 2, [3.0, 2.0]),  # of b: 2.5, 1.5
    ("c1", 4, [0.0, 2.0]),
    ("c2", 4, [1.0, 3.0]),  # of c: 0.5, 2.5
]


def test_each_entry_is_the_median_of_the_groups_means_whatever_their_weights(tmp_path: Path) -> None:
    grouped = means(tmp_path, HONEST, [0, 1, 2])
    np.testing.assert_allclose(grouped.mean(), [1.75, 2.5], atol=8 * STEP)
    np.testing.assert_array_equal(grouped.mean(1, 2), grouped.mean()[1:])


def test_a_result_is_in_the_sum_of_its_group_and_in_no_other(tmp_path: Path) -> None:
    grouped = summed(tmp_path, {"a1": 2, "b1": 0, "c1": 1}, [("a1", 1, [1, 1]), ("c1", 1, [1, 1])])
    assert [sorted(each.contained) for each in grouped.sums] == [[], ["run/0/c1"], ["run/0/a1"]]


def test_of_two_groups_that_are_left_it_is_the_mean_of_both(tmp_path: Path) -> None:
    np.testing.assert_allclose(means(tmp_path, HONEST, [0, 2]).mean(), [1.125, 2.75], atol=8 * STEP)


def test_a_group_that_is_left_out_is_in_nothing(tmp_path: Path) -> None:
    grouped = means(tmp_path, [*HONEST[:4], ("c1", 8, [-16.0, 16.0]), ("c2", 8, [-16.0, 16.0])], [0, 1])
    np.testing.assert_allclose(grouped.mean(), [2.125, 2.25], atol=8 * STEP)
    (loss,) = grouped.held_out()
    assert loss.examples == 8
    assert loss.value == pytest.approx((1 * 0.1 + 3 * 0.3 + 2 * 0.2 + 2 * 0.2) / 8)


@pytest.mark.parametrize("lie", [[16.0, 16.0], [-16.0, -16.0], [16.0, -16.0]])
def test_one_lie_of_whatever_size_moves_no_entry_beyond_what_honest_groups_have(tmp_path: Path, lie: list[float]) -> None:
    median = means(tmp_path, [*HONEST[:5], ("c2", 8, lie)], [0, 1, 2]).mean()
    assert (median >= np.array([1.75, 1.5]) - 8 * STEP).all()
    assert (median <= np.array([2.5, 3.0]) + 8 * STEP).all()


def test_what_all_good_groups_measured_is_one_mean_over_their_examples(tmp_path: Path) -> None:
    (loss,) = means(tmp_path, HONEST, [0, 1, 2]).held_out()
    assert (loss.name, loss.examples) == ("loss", 16)
    assert loss.value == pytest.approx((0.1 + 0.9 + 0.4 + 0.4 + 1.6 + 1.6) / 16)


def test_those_who_clipped_are_counted_over_the_good_groups(tmp_path: Path) -> None:
    groups = {f"{group}{number}": place for place, group in enumerate("abc") for number in (1, 2)}
    grouped = summed(tmp_path, groups, [])
    for client in groups:
        path = result(tmp_path, 1, [0.0, 0.0], clipped=client in ("a1", "b1", "b2", "c1"))
        grouped.fold(Part(f"run/0/{client}", client), path)
    for each in grouped.sums:
        each.unmask(none())
    grouped.close([0, 1])
    assert grouped.clipped == 3


def test_nonsense_spoils_the_sum_of_its_group_alone(tmp_path: Path) -> None:
    grouped = summed(tmp_path, {client: ord(client[0]) - ord("a") for client, *_ in HONEST}, HONEST)
    nonsense = Summand(np.full(2, 0x7FFFFFFF, LAYOUT.dtype), LAYOUT.numbers({summand.CLIENTS: 1, summand.WEIGHT: 1}))
    grouped.sums[1].fold(Part("run/0/b3", "b3"), _written(tmp_path, nonsense))
    with pytest.raises(BadSum, match=r"an entry of the sum of updates is .* where at most 10 can be"):
        grouped.sums[1].unmask(none())
    for group in (0, 2):
        grouped.sums[group].unmask(none())


def test_the_norm_is_held_against_each_group_by_its_own_weight(tmp_path: Path) -> None:
    plan = SecurePlan("run", 2, 9, 0.0, CLIP, SCALE.fraction_bits, 32, CAP, max_norm=5.0)
    sums = [MaskedSum(LAYOUT, SCALE, plan, ("loss",)) for _ in range(2)]
    sums[0].fold(Part("run/0/a1", "a1"), result(tmp_path, 4, [3.0, 4.0]))
    sums[1].fold(Part("run/0/b1", "b1"), result(tmp_path, 4, [3.0, 4.1]))
    sums[0].unmask(none())
    with pytest.raises(BadSum, match=r"a norm of 2\.54\d* where at most 2\.50\d* can be \(run\.max_update_norm\)"):
        sums[1].unmask(none())


async def test_what_was_masked_for_a_sum_of_an_earlier_process_is_not_added_to_this_one(tmp_path: Path) -> None:
    """It was accepted and not yet added when the coordinator was killed."""
    content = result(tmp_path, 1, [1.0, 1.0]).read_bytes()
    digest = hashlib.sha256(content).digest()
    spool = RoundSpool(tmp_path / "spool", Troubles())
    path = spool.path("alice", digest)
    path.parent.mkdir()
    path.write_bytes(content)
    grouped = GroupedSum([MaskedSum(LAYOUT, SCALE, PLAN, ("loss",)) for _ in range(3)])
    accepted = Part("run/0/alice", "alice", PartState.ACCEPTED, digest=digest)
    assert await Tally(grouped, spool, len(content), 0, Troubles()).restore([accepted]) == [accepted]
    assert not path.exists()
    assert not any(each.contained for each in grouped.sums)


def _written(folder: Path, sent: Summand) -> Path:
    path = folder / "nonsense"
    path.write_bytes(b"".join(sent.pieces()))
    return path

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from choral_server.cohort import choose, dealt, selected
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.lists(st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), unique=True, max_size=20)
SEEDS = st.integers(0, 2**63)


@given(SEEDS, st.integers(0, 1000), NAMES, st.integers(0, 25), st.randoms(use_true_random=False))
def test_the_cohort_depends_on_seed_round_and_names_alone(
    seed: int, round: int, names: list[str], size: int, random: object
) -> None:
    chosen = choose(seed, round, names, size)
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(seed, round, iter(shuffled), size) == chosen
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == min(size, len(names))
    assert set(chosen) <= set(names)


def test_the_cohort_is_the_same_in_every_process_and_release() -> None:
    names = ["alice", "bob", "carol", "dave", "erin"]
    assert [choose(7, number, names, 2) for number in range(3)] == [("bob", "dave"), ("bob", "dave"), ("dave", "erin")]


@given(SEEDS, st.integers(0, 1000), NAMES.filter(bool), st.data())
def test_one_more_seat_or_one_absence_changes_only_that(seed: int, round: int, names: list[str], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(names)))
    chosen = set(choose(seed, round, names, size))
    assert chosen <= set(choose(seed, round, names, size + 1))
    gone = data.draw(st.sampled_from(names))
    assert chosen - {gone} <= set(choose(seed, round, [name for name in names if name != gone], size))


def test_every_client_and_every_pair_is_chosen_about_as_often_as_any_other() -> None:
    names = [f"client-{number}" for number in range(10)]
    rounds = 3000
    cohorts = [choose(1, number, names, 3) for number in range(rounds)]
    single = Counter(name for cohort in cohorts for name in cohort)
    pairs = Counter(pair for cohort in cohorts for pair in combinations(cohort, 2))
    assert len(pairs) == 45
    # 5 standard deviations of the binomial: 0.3 and 1/15 of the rounds
    assert all(abs(single[name] - 900) < 5 * (rounds * 0.3 * 0.7) ** 0.5 for name in names)
    assert all(abs(count - 200) < 5 * (rounds / 15 * 14 / 15) ** 0.5 for count in pairs.values())


def test_other_seeds_and_rounds_choose_others() -> None:
    names = [f"client-{number}" for number in range(50)]
    assert len({choose(seed, round, names, 5) for seed in range(10) for round in range(10)}) == 100


@pytest.mark.parametrize(
    ("cohort_size", "over_selection", "asked"),
    [
        (2, 0.0, 2),
        (10, 0.3, 13),
        (10, 0.31, 14),
        (1, 0.01, 2),
        (3, 1.0, 6),
        (100, 0.07, 107),
        (50, 0.1, 55),
        (25, 0.12, 28),
        (7, 0.3, 10),
    ],
)
def test_over_selection_is_rounded_up_but_not_by_floating_point(cohort_size: int, over_selection: float, asked: int) -> None:
    assert selected(cohort_size, over_selection) == asked


@given(st.text(max_size=10), NAMES, st.integers(1, 12), st.randoms(use_true_random=False))
def test_all_are_dealt_into_groups_of_which_none_has_two_more_than_another(
    order: str, names: list[str], groups: int, random: object
) -> None:
    group_of = dealt(order, names, groups)
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert dealt(order, iter(shuffled), groups) == group_of
    assert group_of.keys() == set(names)
    sizes = Counter(group_of.values())
    assert set(sizes) <= set(range(groups))
    assert max(sizes[group] for group in range(groups)) - min(sizes[group] for group in range(groups)) <= 1


def test_groups_are_the_same_in_every_process_and_release() -> None:
    names = ["alice", "bob", "carol", "dave", "erin", "frank"]
    assert [dealt(f"7/{number}/group", names, 3) for number in range(2)] == [
        {"alice": 2, "bob": 1, "carol": 1, "dave": 0, "erin": 0, "frank": 2},
        {"alice": 2, "bob": 1, "carol": 1, "dave": 0, "erin": 2, "frank": 0},
    ]


def test_every_pair_meets_in_a_group_about_as_often_as_any_other() -> None:
    names, rounds = [f"client-{number}" for number in range(9)], 2000
    met: Counter[tuple[str, str]] = Counter()
    for number in range(rounds):
        group_of = dealt(f"1/{number}/group", names, 3)
        met.update(pair for pair in combinations(names, 2) if group_of[pair[0]] == group_of[pair[1]])
    # of eight others two are in one's group: 5 standard deviations of the binomial
    assert len(met) == 36
    assert all(abs(count - rounds / 4) < 5 * (rounds / 4 * 3 / 4) ** 0.5 for count in met.values())

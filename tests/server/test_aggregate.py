from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from choral_server.aggregate import FRACTION_BITS, WeightedSum, entry_bound
from choral_server.rounds import Part, PartState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

Update = tuple[NDArray[np.float32], int]
CAP = 2**20
DELTAS = arrays(np.float32, 7, elements=st.floats(-100, 100, width=32))
UPDATES = st.lists(st.tuples(DELTAS, st.integers(1, 2 * CAP)), min_size=1, max_size=6)


@pytest.fixture(scope="session")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool") / "1.upload"


def folded(spool: Path, updates: Sequence[Update], cap: int = CAP) -> NDArray[np.float64]:
    total = WeightedSum(len(updates[0][0]), cap)
    for delta, examples in updates:
        add(total, spool, delta, examples)
    return total.mean()


def add(total: WeightedSum, spool: Path, delta: NDArray[np.float32], examples: int, client: str = "alice") -> None:
    spool.write_bytes(delta.astype("<f4").tobytes())
    total.fold(Part(f"run/0/{client}", client, PartState.ACCEPTED, examples=examples), spool)


def obvious(updates: Sequence[Update], cap: int = CAP) -> NDArray[np.float64]:
    weights = np.array([min(examples, cap) for _, examples in updates], np.float64)
    deltas = np.array([delta for delta, _ in updates], np.float64)
    return (deltas * weights[:, None]).sum(axis=0) / weights.sum()


def test_a_weighted_mean_by_hand(spool: Path) -> None:
    alice, bob = np.array([1.0, -2.0, 0.0], np.float32), np.array([5.0, 2.0, 0.5], np.float32)
    mean = folded(spool, [(alice, 30), (bob, 10)])
    assert mean.dtype == np.float64
    np.testing.assert_allclose(mean, [2.0, -1.0, 0.125], rtol=0, atol=1e-9)


@given(UPDATES)
def test_equals_the_obvious_mean(spool: Path, updates: list[Update]) -> None:
    """One rounding to 2^-46 of the cap for each update: an error of cap · 2^-47 / weight."""
    weight = sum(min(examples, CAP) for _, examples in updates)
    error = len(updates) * CAP * 2.0 ** -(FRACTION_BITS + 1) / weight
    np.testing.assert_allclose(folded(spool, updates), obvious(updates), rtol=1e-14, atol=error + 1e-13)


@given(st.lists(st.tuples(DELTAS, st.integers(1000, CAP)), min_size=1, max_size=6))
def test_from_a_thousand_examples_on_the_error_is_below_1e_10(spool: Path, updates: list[Update]) -> None:
    np.testing.assert_allclose(folded(spool, updates), obvious(updates), rtol=0, atol=1e-10)


@given(UPDATES, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_bit(spool: Path, updates: list[Update], random: object) -> None:
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert folded(spool, updates).tobytes() == folded(spool, shuffled).tobytes()


def test_all_orders_of_updates_that_floats_would_sum_differently(spool: Path) -> None:
    updates = [
        (np.array([value], np.float32), examples) for value, examples in [(1e4, 7), (-1e4, 7), (1e-5, 1), (0.1, 3), (3e-8, 9)]
    ]
    assert len({folded(spool, order).tobytes() for order in permutations(updates)}) == 1
    sums = {sum(float(delta[0]) * examples for delta, examples in order) for order in permutations(updates)}
    assert len(sums) > 1  # or this test would show nothing


@pytest.mark.parametrize(("steps", "rounded"), [(0.25, 0.0), (0.75, 1.0), (-0.75, -1.0), (2.5, 2.0), (3.5, 4.0)])
def test_each_update_is_rounded_to_the_nearest_step(spool: Path, steps: float, rounded: float) -> None:
    step = 2.0**-FRACTION_BITS
    assert folded(spool, [(np.array([steps * step], np.float32), CAP)]).tolist() == [rounded * step]


def test_one_client_alone_is_taken_as_it_is(spool: Path) -> None:
    delta = np.array([0.25, -3.5, 0.0, 1e-3], np.float32)
    assert folded(spool, [(delta, CAP)])[:3].tolist() == [0.25, -3.5, 0.0]
    np.testing.assert_allclose(folded(spool, [(delta, 202)]), delta, rtol=0, atol=1e-9)


def test_a_weight_is_capped(spool: Path) -> None:
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert folded(spool, [(zero, 100), (one, 10**9)], cap=100) == pytest.approx(0.5, abs=1e-12)
    assert folded(spool, [(zero, 300), (one, 100)], cap=400) == pytest.approx(0.25, abs=1e-12)
    assert folded(spool, [(zero, 5), (one, 7)], cap=1) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2**18 - 1, 2**18, 2**18 + 1, 2**19 + 5])
def test_blocks_meet_without_a_seam(spool: Path, size: int) -> None:
    deltas = np.random.default_rng(size).normal(size=(2, size)).astype(np.float32)
    updates = [(deltas[0], CAP), (deltas[1], CAP // 2)]
    np.testing.assert_allclose(folded(spool, updates), obvious(updates), rtol=0, atol=1e-10)


@pytest.mark.parametrize("cohort_size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_admissible_updates_do_not_overflow(spool: Path, cohort_size: int, sign: int) -> None:
    """As intake compares: in float32, to which the bound may have been rounded up."""
    largest = np.array([np.float32(entry_bound(cohort_size)) * sign], np.float32)
    total = WeightedSum(1, CAP)
    for _ in range(cohort_size):
        add(total, spool, largest, CAP)
    assert total.mean().tolist() == largest.tolist()


def test_the_bound_is_not_needlessly_low() -> None:
    """Twice the bound can overflow, so no laxer power of two would do."""
    assert entry_bound(1) == 65536
    assert entry_bound(8) == 8192
    assert 2 * 8 * int(entry_bound(8)) * 2**FRACTION_BITS == 2**63


@given(UPDATES, st.data())
def test_no_grouping_changes_a_bit_whatever_is_saved_and_loaded_between(
    spool: Path, updates: list[Update], data: st.DataObject
) -> None:
    size = len(updates[0][0])
    total = WeightedSum(size, CAP)
    for number, (delta, examples) in enumerate(updates):
        add(total, spool, delta, examples, f"client-{number}")
        if data.draw(st.booleans(), label="saved here"):
            total.save(spool.with_name("sum"))
            total = WeightedSum(size, CAP)
            total.load(spool.with_name("sum"))
    assert total.mean().tobytes() == folded(spool, updates).tobytes()
    assert total.contained == {f"run/0/client-{number}" for number in range(len(updates))}


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "header", "size", "cap"])
def test_a_sum_that_is_damaged_or_of_something_else_is_not_taken_for_one(spool: Path, damage: str) -> None:
    total, path = WeightedSum(3, CAP), spool.with_name("sum")
    add(total, spool, np.ones(3, np.float32), 7)
    total.save(path)
    content = path.read_bytes()
    changed = {"bit": content[:-1] + b"\x40", "short": content[:-8], "empty": b"", "header": b"{}\n" + content.split(b"\n", 1)[1]}
    path.write_bytes(changed.get(damage, content))
    with pytest.raises(ValueError):
        WeightedSum(4 if damage == "size" else 3, 5 if damage == "cap" else CAP).load(path)


@pytest.mark.parametrize(
    "change",
    [{"weight": 0}, {"weight": "1"}, {"weight": None}, {"contained": 1}, {"contained": [[1]]}, {"size": []}, {"more": 1}],
)
def test_a_sum_whose_first_line_says_something_else_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "update").write_bytes(np.ones(2, "<f4").tobytes())
    whole = WeightedSum(2, 10)
    whole.fold(Part("a", "alice", examples=5), tmp_path / "update")
    whole.save(tmp_path / "sum")
    line, _, content = (tmp_path / "sum").read_bytes().partition(b"\n")
    said = json.loads(line)
    for about in (json.dumps(said | change).encode(), json.dumps({"size": 2, "cap": 10}).encode(), b"[" * 100_000, b""):
        (tmp_path / "sum").write_bytes(about + b"\n" + content)
        if change != {"more": 1} or about[:9] != line[:9]:
            with pytest.raises(ValueError, match="is damaged"):
                WeightedSum(2, 10).load(tmp_path / "sum")
    (tmp_path / "sum").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        WeightedSum(2, 10).load(tmp_path / "sum")

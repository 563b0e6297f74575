"""What a client adds to a sum: how it is laid out for each kind of round, and its bytes there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from choral.metrics import LOSS, Metric
from choral.plan import Kind, Plan, SecurePlan, Training
from choral.secagg import summand, wide
from choral.secagg.masks import KEY_BYTES, Mask
from choral.secagg.summand import Layout, Summand, layout_of
from choral.tasks.boston_housing import task as boston

SECURE = SecurePlan("run/1", 3, 10, 0.0, 8.0, 24, 32, 4096)
METRICS = (LOSS, "mae")
BLOCK = 1 << 20  # bytes that are read at once


def plan(kind: Kind, evaluate: bool = True, ring_bits: int = 32) -> Plan:
    return Plan(kind, "small", "1", Training(), 0, evaluate, 3, replace(SECURE, ring_bits=ring_bits))


MEASURED = ("loss examples", "loss total", "mae examples", "mae total")


def test_training_is_an_update_with_its_weight_and_what_was_measured() -> None:
    assert layout_of(plan(Kind.TRAINING), 7, None, METRICS) == Layout(7, 32, ("clients", "clipped", "weight", *MEASURED))
    assert layout_of(plan(Kind.TRAINING, evaluate=False, ring_bits=64), 7, 2, METRICS) == Layout(
        7, 64, ("clients", "clipped", "weight")
    )


def test_an_evaluation_is_what_was_measured() -> None:
    assert layout_of(plan(Kind.EVALUATION), 7, 2, METRICS) == Layout(0, 32, ("clients", *MEASURED))


def test_statistics_are_the_sums_of_each_feature() -> None:
    names = ("clients", "count", "feature 0", "feature 0 squared", "feature 1", "feature 1 squared")
    assert layout_of(plan(Kind.STATISTICS), 7, 2, METRICS) == Layout(0, 32, names)
    assert layout_of(plan(Kind.STATISTICS), 7, None, METRICS) == Layout(0, 32, ("clients", "count"))


def test_what_is_not_summed_securely_is_not_laid_out_so() -> None:
    with pytest.raises(AssertionError):
        layout_of(replace(plan(Kind.TRAINING), secure=None), 7, None, METRICS)


def test_a_masked_update_is_hardly_longer_than_one_of_float32() -> None:
    million = 1_000_000
    layout = layout_of(plan(Kind.TRAINING), million, 13, (LOSS, *boston.metrics))
    assert layout.payload_bytes == 4 * million + 32 * 9
    assert layout.payload_bytes <= 1.02 * 4 * million
    assert replace(layout, ring_bits=64).payload_bytes == 8 * million + 32 * 9


@pytest.mark.parametrize(("bits", "name"), [(32, "<u4"), (64, "<u8")])
def test_nothing_is_the_sum_of_nobody(bits: int, name: str) -> None:
    layout = Layout(3, bits, ("clients", "weight"))
    nothing = layout.zero()
    assert nothing.vector.dtype == np.dtype(name) == layout.dtype
    assert nothing.vector.tolist() == [0, 0, 0]
    assert wide.decode(nothing.numbers) == [0.0, 0.0]
    assert b"".join(nothing.pieces()) == bytes(layout.payload_bytes)


def test_numbers_are_in_the_order_of_their_names_and_none_is_zero() -> None:
    layout = Layout(0, 32, ("clients", "weight", "loss total"))
    assert wide.decode(layout.numbers({"weight": 7, "clients": 1, "of no interest": 5})) == [1.0, 7.0, 0.0]
    with pytest.raises(ValueError, match="nan is beyond"):
        layout.numbers({"weight": float("nan")})


def test_a_metric_weighs_its_examples_but_no_more_than_the_cap() -> None:
    measured = summand.measured([Metric("loss", 0.5, 7), Metric("mae", 3.0, 100)], weight_cap=10)
    assert measured == {"loss examples": 7, "loss total": 3.5, "mae examples": 10, "mae total": 30.0}


def any_summand(layout: Layout, seed: int) -> Summand:
    rng = np.random.default_rng(seed)
    largest = np.iinfo(layout.dtype).max
    vector = rng.integers(0, largest, layout.size, layout.dtype.type, endpoint=True).astype(layout.dtype)
    return Summand(vector, rng.integers(0, 2**64 - 1, (len(layout.names), 4), np.uint64, endpoint=True))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_what_is_written_is_added_whatever_the_blocks(tmp_path: Path, bits: int, beyond: int) -> None:
    layout = Layout(2 * BLOCK // (bits // 8) + beyond, bits, ("clients", "weight", "clipped"))
    total, expected = layout.zero(), layout.zero()
    for seed in range(3):
        one = any_summand(layout, seed)
        pieces = list(one.pieces())
        assert max(map(len, pieces)) <= BLOCK
        path = tmp_path / "one"
        path.write_bytes(b"".join(pieces))
        assert path.stat().st_size == layout.payload_bytes
        total.add_file(path)
        np.add(expected.vector, one.vector, out=expected.vector)
        wide.add(expected.numbers, one.numbers)
    assert np.array_equal(total.vector, expected.vector)
    assert np.array_equal(total.numbers, expected.numbers)


def test_numbers_alone_are_written_and_added(tmp_path: Path) -> None:
    layout = Layout(0, 32, ("clients", "count"))
    one = Summand(np.empty(0, layout.dtype), layout.numbers({"clients": 1, "count": 41.5}))
    (tmp_path / "one").write_bytes(b"".join(one.pieces()))
    total = layout.zero()
    total.add_file(tmp_path / "one")
    total.add_file(tmp_path / "one")
    assert wide.decode(total.numbers) == [2.0, 83.0]


@pytest.mark.parametrize("bits", [32, 64])
def test_masks_of_two_cancel_in_their_sum_and_hide_each(tmp_path: Path, bits: int) -> None:
    layout, key, total = (
        Layout(1000, bits, ("clients", "weight")),
        bytes(KEY_BYTES),
        Layout(1000, bits, ("clients", "weight")).zero(),
    )
    plain = [Summand(np.full(1000, number, layout.dtype), layout.numbers({"clients": 1, "weight": number})) for number in (3, 4)]
    for one, mask in zip(plain, (Mask([key], ()), Mask((), [key])), strict=True):
        before = b"".join(one.pieces())
        one.add_mask(mask)
        after = b"".join(one.pieces())
        assert not any(before[at : at + 8] == after[at : at + 8] for at in range(0, len(before), 8))
        (tmp_path / "one").write_bytes(after)
        total.add_file(tmp_path / "one")
    assert set(total.vector.tolist()) == {7}
    assert wide.decode(total.numbers) == [2.0, 7.0]

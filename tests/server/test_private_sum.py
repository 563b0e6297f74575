"""The sum of a private round: how far one client can move it, and how much noise is on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from choral import codecs
from choral.privacy.noise import STEPS, Noise, discrete_gaussian, gaussian
from choral_server.private_sum import PrivateSum, Terms
from choral_server.rounds import Part, PartState
from numpy.typing import NDArray
from scipy import stats

CLIP, SIZE = 0.7, 1000
SILENT: Noise = lambda count: np.zeros(count, np.int64)  # noqa: E731
TERMS = Terms(CLIP, noise=1.3, expected=4)
SURELY = 1e-9
rng = np.random.default_rng(7)


class Uploads:
    """Files as clients send them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def of(self, values: NDArray[np.floating], codec: str = "", examples: int = 10) -> tuple[Part, Path]:
        self._count += 1
        path = self._folder / f"{self._count}"
        blocks = (values[start : start + codecs.BLOCK].astype(np.float32) for start in range(0, values.size, codecs.BLOCK))
        path.write_bytes(b"".join(codecs.encoded(blocks, codecs.parse(codec), codecs.rng_of(0))))
        return Part(f"run/0/{self._count}", f"c{self._count}", PartState.ACCEPTED, examples=examples, codec=codec), path


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path)


def total(uploads: Uploads, updates: Sequence[NDArray[np.floating]], terms: Terms = TERMS, codec: str = "") -> NDArray[np.float64]:
    """The sum, without noise."""
    made = PrivateSum(updates[0].size if updates else SIZE, terms, SILENT)
    for update in updates:
        made.fold(*uploads.of(update, codec))
    made.release()
    return made.mean() * terms.expected


def updates(count: int, size: int = SIZE, norm: float = 0.3) -> list[NDArray[np.float32]]:
    drawn = rng.normal(size=(count, size))
    return list((drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * norm).astype(np.float32))


def hostile(size: int) -> list[NDArray[np.float32]]:
    """What an adversary may send to move a sum as far as it can; what is not finite never gets so far."""
    spike, huge = np.zeros(size, np.float32), np.full(size, 3e38, np.float32)
    spike[0] = 3e38
    edge = np.full(size, CLIP / math.sqrt(size), np.float32)  # at the clip, where rounding could carry it over
    half = np.full(size, 0.5 * TERMS.noise * CLIP / STEPS, np.float32)  # half a step everywhere
    return [spike, -spike, huge, edge, np.nextafter(edge, np.float32(1)), half, 1e6 * updates(1, size)[0]]


@pytest.mark.parametrize("size", [1, 2, 17, 1000, 300_000])
@pytest.mark.parametrize("codec", ["", "bf16", "int8", "topk:0.1"])
def test_one_client_moves_the_sum_by_the_clip_and_no_further(uploads: Uploads, size: int, codec: str) -> None:
    others = updates(2, size)
    before = total(uploads, others)
    for update in hostile(size):
        assert np.linalg.norm(total(uploads, [*others, update]) - before) <= CLIP + 1e-9  # of the subtraction, in float64
        if codec == "int8" and np.abs(update).max() > 1e38:
            continue  # a scale that is infinite, which is refused before
        assert np.linalg.norm(total(uploads, [update], codec=codec)) <= CLIP


def test_replacing_a_client_moves_it_by_twice_the_clip_at_the_most(uploads: Uploads) -> None:
    others, (one,) = updates(3), updates(1, norm=5.0)
    moved = np.linalg.norm(total(uploads, [*others, one]) - total(uploads, [*others, -one]))
    assert 1.99 * CLIP < moved <= 2 * CLIP


def test_what_is_short_stays_as_it_is(uploads: Uploads) -> None:
    few = updates(3)
    step = TERMS.noise * CLIP / STEPS
    assert np.abs(total(uploads, few) - np.sum(few, axis=0, dtype=np.float64)).max() <= 1.5 * step


def test_examples_do_not_count(uploads: Uploads) -> None:
    (one,) = updates(1)
    made = [PrivateSum(SIZE, TERMS, SILENT) for _ in range(2)]
    for each, examples in zip(made, (1, 2**40), strict=True):
        each.fold(*uploads.of(one, examples=examples))
        each.release()
    assert (made[0].mean() == made[1].mean()).all()


def test_nothing_at_all_and_zeros_are_sums_too(uploads: Uploads) -> None:
    assert not total(uploads, []).any()
    assert not total(uploads, [np.zeros(SIZE)] * 3).any()


@pytest.mark.parametrize("came", [0, 1, 4], ids=["nobody came", "one of four came", "all came"])
@pytest.mark.parametrize("source", [gaussian, discrete_gaussian])
def test_the_noise_is_what_was_promised_however_many_came(uploads: Uploads, came: int, source: type) -> None:
    """Of a sum of zeros what is left is the noise: χ² with as many degrees as elements."""
    size = 50_000
    made = PrivateSum(size, TERMS, source())
    for _ in range(came):
        made.fold(*uploads.of(np.zeros(size)))
    made.release()
    noise = made.mean() * TERMS.expected / (TERMS.noise * CLIP)
    assert SURELY < stats.chi2.cdf(np.square(noise).sum(), size) < 1 - SURELY
    assert stats.kstest(noise, "norm").pvalue > SURELY


def test_the_sum_is_divided_by_those_expected(uploads: Uploads) -> None:
    (one,) = updates(1)
    made = PrivateSum(SIZE, Terms(CLIP, 1e-1, expected=10), SILENT)
    made.fold(*uploads.of(one))
    made.release()
    assert made.mean() == pytest.approx(one / 10, abs=1e-6)


def test_nobody_reads_it_without_noise_and_nobody_adds_it_twice(uploads: Uploads, tmp_path: Path) -> None:
    made = PrivateSum(SIZE, TERMS, gaussian())
    made.fold(*uploads.of(updates(1)[0]))
    with pytest.raises(AssertionError, match="nobody reads it before there is noise on it"):
        made.mean()
    made.release()
    first = made.mean()
    made.release()
    assert (made.mean() == first).all()
    assert (np.concatenate([made.mean(0, 300), made.mean(300, SIZE)]) == first).all()
    with pytest.raises(AssertionError, match="written as a version, and nowhere else"):
        made.save(tmp_path / "sum")


def test_a_saved_sum_goes_on_as_it_was_and_gets_other_noise(uploads: Uploads, tmp_path: Path) -> None:
    first = uploads.of(updates(1, norm=9.0)[0])
    made = PrivateSum(SIZE, TERMS, gaussian())
    made.fold(*first)
    made.save(tmp_path / "sum")
    again = [PrivateSum(SIZE, TERMS, source) for source in (SILENT, gaussian())]
    for each in (*again, made):
        if each is not made:
            each.load(tmp_path / "sum")
            assert each.contained == {first[0].assignment}
        each.release()
    assert np.linalg.norm(again[0].mean()) * TERMS.expected == pytest.approx(CLIP, rel=1e-3)
    assert (again[1].mean() != made.mean()).mean() > 0.99
    with pytest.raises(ValueError, match="damaged, or not a sum"):
        PrivateSum(SIZE, Terms(CLIP, 2.0, 4), SILENT).load(tmp_path / "sum")  # on another grid


@pytest.mark.parametrize("saved", [False, True])
def test_how_many_were_short_enough_is_told_with_noise(uploads: Uploads, tmp_path: Path, saved: bool) -> None:
    terms = Terms(CLIP, 1.0, expected=5, clip_noise=2.0)
    short, long = updates(1, norm=0.1)[0], updates(1, norm=3.0)[0]

    def within(source: Noise) -> float:
        made = PrivateSum(SIZE, terms, source)
        for update in (short, long, short, short, long):
            made.fold(*uploads.of(update))
        if saved:
            made.save(tmp_path / "sum")
            made = PrivateSum(SIZE, terms, source)
            made.load(tmp_path / "sum")
        made.release()
        assert made.within is not None
        return made.within

    assert within(SILENT) == pytest.approx(3 / 5)
    off = [(within(gaussian()) - 3 / 5) * 5 / (2.0 * 0.5) for _ in range(200)]
    assert stats.kstest(off, "norm").pvalue > SURELY


def test_how_many_were_short_enough_cannot_be_read_from_the_last_bits(uploads: Uploads) -> None:
    """It is told as one integer of a grid on which every other number of them lies as well."""
    terms = Terms(CLIP, 1.0, expected=5, clip_noise=3.7)
    each = int(STEPS / 3.7)
    for _ in range(20):
        made = PrivateSum(SIZE, terms, gaussian())
        for update in updates(3, norm=0.1):
            made.fold(*uploads.of(update))
        made.release()
        assert made.within is not None
        total = (made.within - 0.5) * 2 * each * 5
        assert total == pytest.approx(round(total), abs=1e-3)


def test_a_clip_that_does_not_follow_is_told_nothing(uploads: Uploads) -> None:
    made = PrivateSum(SIZE, TERMS, gaussian())
    made.release()
    assert made.within is None

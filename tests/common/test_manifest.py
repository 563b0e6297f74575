from __future__ import annotations

from dataclasses import replace

import pytest
from choral.manifest import Entry, EntryKind, Manifest, first_difference

WEIGHT = Entry("0.weight", "F32", (32, 13), 0, EntryKind.AVERAGED)
BIAS = Entry("0.bias", "BF16", (32,), 416, EntryKind.AVERAGED)
STEPS = Entry("1.num_batches_tracked", "I64", (), 0, EntryKind.COUNTER)
OURS = Manifest((WEIGHT, BIAS, STEPS))


def test_sizes() -> None:
    assert [entry.size for entry in OURS.entries] == [416, 32, 1]
    assert OURS.averaged == (WEIGHT, BIAS)
    assert OURS.size == 448
    assert replace(WEIGHT, shape=(3, 0)).size == 0


def test_equal_manifests_do_not_differ() -> None:
    assert first_difference(OURS, Manifest((WEIGHT, BIAS, STEPS))) is None
    assert first_difference(Manifest(()), Manifest(())) is None


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (
            (replace(WEIGHT, shape=(16, 13)), BIAS, STEPS),
            "entry 0 is 0.weight F32 [16, 13] (averaged) where 0.weight F32 [32, 13] (averaged) is expected",
        ),
        (
            (WEIGHT, replace(BIAS, dtype="F16"), STEPS),
            "entry 1 is 0.bias F16 [32] (averaged) where 0.bias BF16 [32] (averaged) is expected",
        ),
        (
            (WEIGHT, BIAS, replace(STEPS, name="steps")),
            "entry 2 is steps I64 [] (counter) where 1.num_batches_tracked I64 [] (counter) is expected",
        ),
        (
            (WEIGHT, BIAS, replace(STEPS, kind=EntryKind.STATISTIC)),
            "entry 2 is 1.num_batches_tracked I64 [] (statistic) where 1.num_batches_tracked I64 [] (counter) is expected",
        ),
        # what lacks or is too much
        ((WEIGHT, BIAS), "entry 2 is missing where 1.num_batches_tracked I64 [] (counter) is expected"),
        ((WEIGHT, BIAS, STEPS, replace(BIAS, name="new")), "entry 3 is new BF16 [32] (averaged) where nothing is expected"),
        # the first of several
        (
            (BIAS, WEIGHT),
            "entry 0 is 0.bias BF16 [32] (averaged) where 0.weight F32 [32, 13] (averaged) is expected",
        ),
    ],
)
def test_the_first_difference_is_named(theirs: tuple[Entry, ...], told: str) -> None:
    assert first_difference(OURS, Manifest(theirs)) == told


def test_another_offset_is_a_difference() -> None:
    assert first_difference(OURS, Manifest((WEIGHT, replace(BIAS, offset=1), STEPS))) is not None


def test_a_strangers_entry_is_told_in_few_words() -> None:
    long = Entry("x" * 10_000, "y" * 10_000, (1,) * 10_000, 0, EntryKind.AVERAGED)
    told = first_difference(Manifest(()), Manifest((long,)))
    assert told is not None
    assert len(told) < 600
    assert "[10000 dimensions]" in told

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from choral import codecs
from choral.codecs import Lengths
from choral.errors import UpdateRefused
from choral.messages import UploadHeader
from choral.metrics import Metric
from choral.plan import Kind
from choral.statistics import Moments
from choral_server.aggregate import entry_bound
from choral_server.intake import MAX_EXAMPLES, Bounds, check_header, check_payload, payload_bytes

HEADER = UploadHeader("run/3/alice", "alice", 202, Kind.TRAINING, 4000, (Metric("loss", 0.5, 20),), (), bytes(32))


def test_how_long_a_payload_is() -> None:
    assert payload_bytes(Kind.TRAINING, 1657, 13) == Lengths(4 * 1657, 4 * 1657)
    assert payload_bytes(Kind.STATISTICS, 1657, 13) == Lengths(8 * 27, 8 * 27)
    assert payload_bytes(Kind.EVALUATION, 1657, 13) == Lengths(0, 0)
    assert payload_bytes(Kind.TRAINING, 10, None, "float32") == Lengths(40, 40)


def test_an_admissible_header_passes() -> None:
    for examples in (1, 202, MAX_EXAMPLES):
        check_header(replace(HEADER, examples=examples), Kind.TRAINING, "", Lengths(4000, 4000), ("loss", "mse"))
    check_header(replace(HEADER, held_out=()), Kind.TRAINING, "", Lengths(4000, 4000), ("loss", "mse"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": Kind.STATISTICS}, "alice sends a statistics result; a training result was asked for"),
        ({"payload_bytes": 3999}, "alice announces 3999 bytes; the model's result has 4000"),
        ({"payload_bytes": -1}, "alice announces -1 bytes; the model's result has 4000"),
        ({"examples": 0}, f"alice claims 0 examples; 1 to {MAX_EXAMPLES} are allowed"),
        ({"examples": -5}, f"alice claims -5 examples; 1 to {MAX_EXAMPLES} are allowed"),
        ({"examples": MAX_EXAMPLES + 1}, f"alice claims {MAX_EXAMPLES + 1} examples"),
        (
            {"held_out": (Metric("loss", 0.5, 20), Metric("mse", 0.5, 0))},
            "alice measured mse on 0 examples; 1 to 1099511627776 are allowed",
        ),
        ({"held_out": (Metric("loss", 0.5, -20),)}, "alice measured loss on -20 examples"),
        ({"held_out": (Metric("loss", math.nan, 20),)}, "alice measured loss = nan; at most 1e+30 is allowed"),
        ({"held_out": (Metric("loss", -math.inf, 20),)}, "alice measured loss = -inf; at most 1e+30 is allowed"),
        ({"held_out": (Metric("loss", -1e300, 20),)}, "alice measured loss = -1e+300; at most 1e+30 is allowed"),
        (
            {"held_out": (Metric("loss", 1.0, 20),) * 2},
            "alice measured 'loss', which was not asked for, or twice; the task has",
        ),
        ({"held_out": (Metric("accuracy", 1.0, 20),)}, "alice measured 'accuracy', which was not asked for, or twice"),
        ({"work": (Metric("train_s", math.inf, 20),)}, "alice measured train_s = inf; at most 1e+30 is allowed"),
        ({"work": (Metric("x" * 65, 1.0, 20),)}, f"alice measured '{'x' * 64}', which was not asked for"),
        ({"work": tuple(Metric(str(number), 1.0, 20) for number in range(33))}, "alice measured '32', which was not asked for"),
    ],
)
def test_a_header_is_refused_before_a_byte_is_stored(change: dict[str, object], told: str) -> None:
    with pytest.raises(UpdateRefused) as refused:
        check_header(replace(HEADER, **change), Kind.TRAINING, "", Lengths(4000, 4000), ("loss", "mse"))  # type: ignore[arg-type]
    assert str(refused.value).startswith(told)


def _delta(folder: Path, values: Sequence[float] | np.ndarray) -> Path:
    path = folder / "0.upload"
    path.write_bytes(np.asarray(values, "<f4").tobytes())
    return path


@pytest.mark.parametrize("cohort_size", [1, 2, 4, 1024])
def test_an_update_up_to_the_bound_is_admitted_and_no_further(tmp_path: Path, cohort_size: int) -> None:
    bound = np.float32(entry_bound(cohort_size))
    assert float(bound) == entry_bound(cohort_size)
    check_payload(HEADER, _delta(tmp_path, [0.0, bound, -bound]), Bounds(cohort_size, 3))
    for beyond in (np.nextafter(bound, np.float32(np.inf)), -np.nextafter(bound, np.float32(np.inf))):
        with pytest.raises(
            UpdateRefused, match=f"the update of alice holds .*, over the bound of {bound:g}: lower the learning rate"
        ):
            check_payload(HEADER, _delta(tmp_path, [0.0, beyond]), Bounds(cohort_size, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, 2**20 + 4])
def test_an_undefined_number_anywhere_is_refused(tmp_path: Path, value: float, place: int) -> None:
    delta = np.zeros(2**20 + 5, np.float32)
    delta[place] = value
    with pytest.raises(UpdateRefused, match="the update of alice holds an infinite or undefined number: lower the learning rate"):
        check_payload(HEADER, _delta(tmp_path, delta), Bounds(2, len(delta)))


STATISTICS = replace(HEADER, kind=Kind.STATISTICS)


def _statistics(folder: Path, vector: Sequence[float] | np.ndarray) -> Path:
    path = folder / "0.upload"
    path.write_bytes(np.asarray(vector, "<f8").tobytes())
    return path


def test_statistics_are_admitted(tmp_path: Path) -> None:
    moments = Moments.of(np.array([[1.0, 2.0], [3.0, 5.0]]))
    check_payload(STATISTICS, _statistics(tmp_path, moments.to_vector()), Bounds(2, features=2))


@pytest.mark.parametrize(
    ("vector", "told"),
    [
        ([2.0, 1.0, 1.0], "1 features"),
        ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "3 features"),
        ([MAX_EXAMPLES * 2.0, 1.0, 1.0, 1.0, 1.0], "examples"),
        ([0.0, 1.0, 1.0, 1.0, 1.0], "examples"),
        ([2.0, math.nan, 1.0, 1.0, 1.0], "not finite"),
        ([2.0, 1.0, 1.0, math.inf, 1.0], "not finite"),
        ([2.0, 1.0, 1.0, 1.0, -1.0], "negative sum of squares"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path: Path, vector: list[float], told: str) -> None:
    with pytest.raises(UpdateRefused, match=told):
        check_payload(STATISTICS, _statistics(tmp_path, vector), Bounds(2, features=2))


@pytest.mark.parametrize("vector", [[2.0, 1e39, 0.0, 1.0, 1.0], [2.0, 0.0, -1e300, 1.0, 1.0], [2.0, 0.0, 0.0, 1.0, 1e300]])
def test_statistics_that_float32_buffers_cannot_hold_are_refused(tmp_path: Path, vector: list[float]) -> None:
    """The model's mean or scale would become infinite, and every client's prediction undefined."""
    with pytest.raises(UpdateRefused):
        check_payload(STATISTICS, _statistics(tmp_path, vector), Bounds(2, features=2))


def test_the_result_of_an_evaluation_has_no_payload_to_check(tmp_path: Path) -> None:
    check_payload(replace(HEADER, kind=Kind.EVALUATION), _delta(tmp_path, []), Bounds(2))


def test_an_update_up_to_the_largest_norm_is_admitted_and_no_further(tmp_path: Path) -> None:
    path = _delta(tmp_path, np.full(2**20 + 4, 3.0))
    norm = 3.0 * (2**20 + 4) ** 0.5
    check_payload(HEADER, path, Bounds(2, 2**20 + 4, max_norm=norm * 1.000001))
    with pytest.raises(UpdateRefused, match=r"the update of alice has a norm of 3072.01, over run.max_update_norm 3072: lower"):
        check_payload(HEADER, path, Bounds(2, 2**20 + 4, max_norm=3072.0))


def test_the_names_that_a_client_gives_are_not_repeated_by_the_yard() -> None:
    header = replace(HEADER, work=tuple(Metric("x" * 10_000, 1.0, 1) for _ in range(32)))
    with pytest.raises(UpdateRefused) as refused:
        check_header(header, Kind.TRAINING, "", Lengths(4000, 4000), ("loss",))
    assert len(str(refused.value)) < 3000


def _encoded(folder: Path, values: np.ndarray, codec: str) -> Path:
    path = folder / "0.upload"
    path.write_bytes(b"".join(codecs.encoded(codecs.blocks(values), codecs.parse(codec), codecs.rng_of(0))))
    return path


@pytest.mark.parametrize("codec", ["bf16", "int8", "topk:0.1", "int8+zstd", "topk:0.1+zstd"])
def test_an_encoded_update_is_held_against_the_same_bounds(tmp_path: Path, codec: str) -> None:
    header, values = replace(HEADER, codec=codec), np.zeros(1000, np.float32)
    values[999] = bound = entry_bound(2)
    check_payload(header, _encoded(tmp_path, values, codec), Bounds(2, 1000))
    values[999] = 2 * bound
    with pytest.raises(UpdateRefused, match=f"the update of alice holds {2 * bound:g}, over the bound of {bound:g}"):
        check_payload(header, _encoded(tmp_path, values, codec), Bounds(2, 1000))
    values[999] = np.inf
    with pytest.raises(UpdateRefused, match=r"alice .*infinite"):
        check_payload(header, _encoded(tmp_path, values, codec), Bounds(2, 1000))


@pytest.mark.parametrize("codec", ["bf16", "int8", "topk:0.1", "float32+zstd"])
def test_a_payload_of_a_codec_that_is_none_is_refused(tmp_path: Path, codec: str) -> None:
    path = _encoded(tmp_path, np.ones(1000, np.float32), codec)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UpdateRefused, match=f"alice sends no {codec.replace('+', '.')} update: "):
        check_payload(replace(HEADER, codec=codec), path, Bounds(2, 1000))


def test_only_the_codec_that_was_asked_for_is_taken() -> None:
    expected = payload_bytes(Kind.TRAINING, 1000, None, "int8")
    header = replace(HEADER, codec="int8", payload_bytes=1016)
    check_header(header, Kind.TRAINING, "int8", expected, ("loss",))
    check_header(replace(HEADER, codec="float32"), Kind.TRAINING, "", Lengths(4000, 4000), ("loss",))
    for told in ("", "bf16", "no codec"):
        with pytest.raises(UpdateRefused, match=f"alice sends its result as {told or 'float32'}; int8 was asked for"):
            check_header(replace(header, codec=told), Kind.TRAINING, "int8", expected, ("loss",))
    with pytest.raises(UpdateRefused, match="alice announces 1017 bytes; the model's result has 1016"):
        check_header(replace(header, payload_bytes=1017), Kind.TRAINING, "int8", expected, ("loss",))
    topk = payload_bytes(Kind.TRAINING, 1000, None, "topk:0.1")
    assert topk == Lengths(5, 307)
    with pytest.raises(UpdateRefused, match="alice announces 308 bytes; the model's result has 5 to 307"):
        check_header(replace(header, codec="topk:0.1", payload_bytes=308), Kind.TRAINING, "topk:0.1", topk, ("loss",))

"""The configuration of secure aggregation: what is derived is safe, what is given and is not is refused, with the arithmetic."""

from __future__ import annotations

import re
from typing import Any

import pytest
from choral.config import parse
from choral.errors import ConfigError
from choral.plan import Kind, SecurePlan
from choral.secagg.graph import shape_of
from choral_server.config import ServerConfig
from choral_server.masked_sum import MaskedSum
from choral_server.secure_aggregation import SecureAggregation
from server.home import Home, config, home

__all__ = ["home"]


def settings(**keys: Any) -> SecureAggregation:
    return parse(keys, SecureAggregation, "server.yaml")


def run(**keys: Any) -> ServerConfig:
    return config({"rounds": 1, "cohort_size": 3} | keys)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (True, SecureAggregation()),
        ({}, SecureAggregation()),
        ({"clip": 1.0, "ring_bits": 64}, SecureAggregation(clip=1.0, ring_bits=64)),
        (False, None),
        (None, None),
    ],
)
def test_it_is_switched_on_or_off_or_says_what_differs(given: object, found: SecureAggregation | None) -> None:
    assert run(secure_aggregation=given).run.secure_aggregation == found


def test_it_is_off_if_nothing_is_said() -> None:
    assert run().run.secure_aggregation is None


def test_the_weight_cap_is_smaller_with_it_unless_it_is_given() -> None:
    assert run().run.cap == 2**20
    assert run(secure_aggregation=True).run.cap == 2**10
    assert run(secure_aggregation=True, weight_cap=100).run.cap == 100
    assert run(weight_cap=100).run.cap == 100


@pytest.mark.parametrize("clients", [3, 100, 101, 1000])
@pytest.mark.parametrize("ring_bits", [32, 64])
def test_the_defaults_are_good_for_few_and_for_many(clients: int, ring_bits: int) -> None:
    secure = run(cohort_size=clients, secure_aggregation={"ring_bits": ring_bits}).run.secure_aggregation
    assert secure is not None
    scale = secure.scale(clients)
    assert clients * secure.clip * 2.0**scale.fraction_bits < 2 ** (ring_bits - 1)
    assert secure.clip * 2.0**scale.fraction_bits >= 2**10 * 2**8, "a client with one example is told in 256 steps"


def test_what_clients_are_told() -> None:
    secure = settings(minimum_cohort=5, threshold=0.8, clip=2.0, ring_bits=64)
    assert secure.plan(Kind.TRAINING, "run/1", 10, 512, 3.0) == SecurePlan("run/1", 5, 10, 0.8, 2.0, 51, 64, 512, 3.0)
    plain = settings().plan(Kind.TRAINING, "run/1", 3, 4096, None)
    assert plain == SecurePlan("run/1", 3, 3, 0.0, 8.0, 26, 32, 4096, 0.0)
    assert settings(fraction_bits=20).scale(3).fraction_bits == 20


@pytest.mark.parametrize(("keys", "largest"), [({}, 1000), ({"threshold": 0.8}, 100)])
def test_how_many_can_be_in_a_sum(keys: dict[str, Any], largest: int) -> None:
    """Statistics come from everyone who is here, who may be more than a cohort."""
    secure = settings(**keys)
    assert secure.largest_cohort == largest
    shape_of(largest, secure.threshold or 0.0)


@pytest.mark.parametrize("kind", [Kind.STATISTICS, Kind.EVALUATION])
async def test_a_round_of_everybody_is_not_held_to_the_bits_of_a_cohort(home: Home, kind: Kind) -> None:
    asked = config({"cohort_size": 3, "secure_aggregation": {"fraction_bits": 26}})
    opened = await home.open(asked)
    secure = opened.plan(kind, 500, 0).secure
    assert secure is not None
    assert secure.most_clients == 500
    assert isinstance(opened.aggregate(kind, 500), MaskedSum)
    with pytest.raises(ConfigError, match="26 bits behind the point: with 4 clients"):
        opened.plan(Kind.TRAINING, 4, 0)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"minimum_cohort": 1}, "minimum_cohort: 1 is not allowed"),
        ({"minimum_cohort": 1001}, "minimum_cohort: 1001 is not allowed"),
        ({"threshold": 2 / 3}, "threshold: 0.6666666666666666 is not allowed"),
        ({"threshold": 1.01}, "threshold: 1.01 is not allowed"),
        ({"clip": 0.0}, "clip: 0.0 is not allowed"),
        ({"clip": float("inf")}, "clip: inf is not allowed"),
        ({"clip": float("nan")}, "clip: nan is not allowed"),
        ({"ring_bits": 48}, "ring_bits: 48 is not allowed"),
        ({"step_s": 0.0}, "step_s: 0.0 is not allowed"),
        ({"step_s": 86_401.0}, "step_s: 86401.0 is not allowed"),
        ({"step_s": float("inf")}, "step_s: inf is not allowed"),
        ({"masks": True}, "masks"),
    ],
)
def test_what_is_out_of_range_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        settings(**keys)
    with pytest.raises(ConfigError, match=re.escape(f"run.secure_aggregation.{told}")):
        run(secure_aggregation=keys)


@pytest.mark.parametrize("given", ["yes", 1, [], 3.5])
def test_what_is_neither_a_switch_nor_a_mapping_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match=r"run\.secure_aggregation"):
        run(secure_aggregation=given)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"cohort_size": 1001, "secure_aggregation": True},
        "secure_aggregation sums 1000 clients at the most, and cohort_size is 1001: lower that",
    ),
    (
        {"cohort_size": 10, "quorum": 2, "secure_aggregation": True},
        "a sum of 2 clients (quorum, or cohort_size) is less than secure_aggregation.minimum_cohort 3: raise the one, or lower "
        "the other; below 3 it hides nothing from the other client",
    ),
    (
        {"cohort_size": 2, "secure_aggregation": True},
        "a sum of 2 clients (quorum, or cohort_size) is less than secure_aggregation.minimum_cohort 3",
    ),
    (
        {"cohort_size": 101, "secure_aggregation": {"threshold": 0.8}},
        "secure_aggregation: a threshold of 0.8 with 101 clients: beyond 100 it follows from the bounds on security and dropouts: "
        "leave it out, or ask fewer clients",
    ),
    (
        {"cohort_size": 3, "secure_aggregation": {"fraction_bits": 27}},
        "secure_aggregation: 27 bits behind the point: with 3 clients and a clip of 8 it must be 5 to 26, since 3 · 8 · 2^bits "
        "must stay below 2^31, and more than 31 bits of the clip say nothing",
    ),
    ({"cohort_size": 3, "secure_aggregation": {"fraction_bits": 4}}, "secure_aggregation: 4 bits behind the point: with 3 clients"),
    (
        {"cohort_size": 3, "secure_aggregation": {"clip": 2.0**31}},
        "secure_aggregation: a clip of 2.14748e+09: it must be 9e-10 to 1e+09",
    ),
    (
        {"cohort_size": 1000, "secure_aggregation": True, "weight_cap": 2**13 + 1},
        "weight_cap 8193 with secure_aggregation: a client with one example weighs 1/8193, and clip 8 with 18 bits behind the "
        "point has 2097152 steps, which leaves it 256 of them; at least 256 are needed: weight_cap at most 8192, or ring_bits: 64",
    ),
    (
        {"cohort_size": 3, "secure_aggregation": True, "compression": {"upload": "int8"}},
        "compression.upload: int8 contradicts secure_aggregation: masks do not cancel in what is rounded or left out: remove it",
    ),
    (
        {"cohort_size": 3, "secure_aggregation": True, "compression": {"upload": "topk"}},
        "contradicts secure_aggregation: masks do not cancel",
    ),
]


@pytest.mark.parametrize(("keys", "told"), REFUSED)
def test_what_cannot_be_summed_so_is_refused_with_the_arithmetic(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        run(**keys)
    assert run(**{key: value for key, value in keys.items() if key != "secure_aggregation"}).run.secure_aggregation is None


@pytest.mark.parametrize(
    "keys",
    [
        {"cohort_size": 1000, "secure_aggregation": True, "weight_cap": 2**13},
        {"cohort_size": 1000, "secure_aggregation": {"ring_bits": 64}, "weight_cap": 2**33},
        {"cohort_size": 2, "secure_aggregation": {"minimum_cohort": 2}},
        {"cohort_size": 100, "secure_aggregation": {"threshold": 0.8}},
        {"cohort_size": 3, "secure_aggregation": {"fraction_bits": 26}},
        {"cohort_size": 10, "quorum": 3, "secure_aggregation": True},
        {"cohort_size": 3, "secure_aggregation": True, "max_update_norm": 5.0},
        {"cohort_size": 3, "secure_aggregation": True, "compression": {"download": "delta"}},
    ],
)
def test_what_is_just_within_the_bounds_is_allowed(keys: dict[str, Any]) -> None:
    if "compression" in keys:
        pytest.importorskip("zstandard")
    assert run(**keys).run.secure_aggregation is not None


def test_what_one_client_weighs_least_is_told_in_the_message_as_it_is_refused() -> None:
    secure = settings()
    with pytest.raises(ValueError, match="weight_cap at most 8192"):
        secure.must_suit(1000, 1000, 8193)
    secure.must_suit(1000, 1000, 8192)


@pytest.mark.parametrize("clients", [2, 3, 10, 100])
def test_a_threshold_is_never_less_than_what_is_safe(clients: int) -> None:
    assert shape_of(clients, 0.67).threshold >= shape_of(clients).threshold

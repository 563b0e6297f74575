from __future__ import annotations

import hashlib
import math
from dataclasses import fields, replace

import pytest
from choral.plan import Kind, Plan, SecurePlan, Training, digest_of, seed_for
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

KEYS = st.tuples(st.integers(0, 2**63), st.integers(0, 10**6), st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True))


def test_a_seed_is_the_same_in_every_process_and_release() -> None:
    # the first eight bytes of SHA-256("7/3/alice"), halved; sha256sum says the same
    assert seed_for(7, 3, "alice") == 0x4E8A593B2F25A818 >> 1


@given(KEYS)
def test_a_seed_has_63_bits(key: tuple[int, int, str]) -> None:
    assert 0 <= seed_for(*key) < 2**63
    assert seed_for(*key) == seed_for(*key)


@given(KEYS, KEYS)
def test_other_work_has_another_seed(a: tuple[int, int, str], b: tuple[int, int, str]) -> None:
    assert (seed_for(*a) == seed_for(*b)) is (a == b)


def test_run_version_and_client_each_change_the_seed() -> None:
    assert len({seed_for(1, 2, "a"), seed_for(2, 2, "a"), seed_for(1, 3, "a"), seed_for(1, 2, "b"), seed_for(12, 0, "a")}) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -0.1),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "0.1"),
        ("momentum", 0.9),
    ],
)
def test_training_refuses_what_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Training(**{field: value})  # type: ignore[arg-type]


def test_training_allows_a_round_without_training() -> None:
    assert Training(epochs=0).epochs == 0


def test_the_digest_of_a_plan_says_what_all_are_asked_alike() -> None:
    plan = Plan(Kind.TRAINING, "small", "1", Training(epochs=2, batch_size=4, learning_rate=0.1), 7, True, cohort=3)
    text = (
        b'choral plan 1{"cohort":3,"evaluate":true,"kind":"training","task":"small","task_version":"1",'
        b'"training":{"batch_size":4,"epochs":2,"learning_rate":0.1}}'
    )
    assert digest_of(plan) == hashlib.sha256(text).digest()
    assert digest_of(replace(plan, seed=8)) == digest_of(plan)
    others = [replace(plan, kind=Kind.EVALUATION), replace(plan, evaluate=False), replace(plan, training=Training(epochs=1))]
    assert len({digest_of(plan), digest_of(replace(plan, cohort=4)), *map(digest_of, others)}) == 5


SECURE = SecurePlan("run/1", 3, 10, 0.0, 8.0, 24, 32, 4096, 0.0)
OTHERWISE = {
    "run": "run/2",
    "least_clients": 4,
    "most_clients": 11,
    "threshold": 0.8,
    "clip": 8.000000000000002,
    "fraction_bits": 23,
    "ring_bits": 64,
    "weight_cap": 4095,
    "max_norm": 1.0,
}


def test_the_digest_of_a_plan_says_each_of_the_terms_of_a_secure_sum() -> None:
    """Or clients that are told different things would add their results up."""
    assert set(OTHERWISE) == {field.name for field in fields(SecurePlan)}
    plain = Plan(Kind.TRAINING, "small", "1", Training(), 7, True, cohort=3)
    secure = replace(plain, secure=SECURE)
    others = [replace(secure, secure=replace(SECURE, **{name: value})) for name, value in OTHERWISE.items()]  # type: ignore[arg-type]
    assert len({digest_of(plan) for plan in (plain, secure, *others)}) == 2 + len(OTHERWISE)
    assert digest_of(replace(secure, seed=8)) == digest_of(secure)
    assert digest_of(replace(plain, secure=replace(SECURE))) == digest_of(secure)


def test_the_digest_of_a_secure_plan_is_the_same_in_every_release() -> None:
    plan = Plan(Kind.TRAINING, "small", "1", Training(epochs=2, batch_size=4, learning_rate=0.1), 7, True, 3, SECURE)
    text = (
        b'choral plan 1{"cohort":3,"evaluate":true,"kind":"training","secure":{"clip":8.0,"fraction_bits":24,"least_clients":3,'
        b'"max_norm":0.0,"most_clients":10,"ring_bits":32,"run":"run/1","threshold":0.0,"weight_cap":4096},"task":"small",'
        b'"task_version":"1","training":{"batch_size":4,"epochs":2,"learning_rate":0.1}}'
    )
    assert digest_of(plan) == hashlib.sha256(text).digest()

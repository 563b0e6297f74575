"""Server optimizers, with numbers computed by hand; that their state survives in a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from choral.config import parse
from choral.errors import ConfigError
from choral_server.strategies import ServerOptimizer, State, fedavg, fedavgm, step
from numpy.typing import NDArray
from safetensors.numpy import load, save


def _vector(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def _delta(*values: float) -> NDArray[np.float64]:
    return np.array(values, np.float64)


# One step


def test_fedavg_adds_the_mean_of_the_changes_times_the_step_size() -> None:
    assert fedavg.step(_vector(1, 2), _delta(0.5, -1), 1.0).tolist() == [1.5, 1.0]
    assert fedavg.step(_vector(1, 2), _delta(0.5, -1), 0.5).tolist() == [1.25, 1.5]


def test_momentum_begins_at_rest() -> None:
    weights, velocity = fedavgm.step(_vector(1, 2), _delta(0.5, -1), None, 0.9, 1.0)
    assert (weights.tolist(), velocity.tolist()) == ([1.5, 1.0], [0.5, -1.0])
    again = fedavgm.step(_vector(1, 2), _delta(0.5, -1), np.zeros(2, np.float32), 0.9, 1.0)
    assert [vector.tolist() for vector in again] == [weights.tolist(), velocity.tolist()]


def test_momentum_keeps_a_share_of_the_velocity() -> None:
    # v = ½ · (4, −2) + (1, 1) = (3, 0); w = (10, 20) + ¼ · v
    weights, velocity = fedavgm.step(_vector(10, 20), _delta(1, 1), _vector(4, -2), 0.5, 0.25)
    assert (weights.tolist(), velocity.tolist()) == ([10.75, 20.0], [3.0, 0.0])
    assert (weights.dtype, velocity.dtype) == (np.float32, np.float32)


def test_a_step_changes_none_of_its_arguments() -> None:
    weights, delta, velocity = _vector(10), _delta(1), _vector(4)
    fedavgm.step(weights, delta, velocity, 0.5, 1.0)
    assert (weights.tolist(), delta.tolist(), velocity.tolist()) == ([10], [1], [4])


def test_the_model_moves_by_the_velocity_that_is_kept() -> None:
    """By what is written beside the version, not by digits that a restart would lose."""
    delta = _delta(1 + 2.0**-30)
    weights, velocity = fedavgm.step(_vector(0), delta, None, 0.5, 1.0)
    assert (weights.tolist(), velocity.tolist()) == ([1.0], [1.0])


# A choice among them


def test_fedavg_carries_nothing() -> None:
    weights, state = step(ServerOptimizer(), _vector(1), _delta(2), {"velocity": _vector(5)})
    assert (weights.tolist(), state) == ([3.0], {})
    assert step(ServerOptimizer(learning_rate=0.5), _vector(1), _delta(2), {})[0].tolist() == [2.0]


def test_without_momentum_or_with_none_it_is_fedavg() -> None:
    rng = np.random.default_rng(1)
    weights, state = rng.normal(size=50).astype(np.float32), State()
    for _ in range(3):
        delta = rng.normal(size=50).astype(np.float32).astype(np.float64)
        plain, _ = step(ServerOptimizer(), weights, delta, {})
        weights, state = step(ServerOptimizer(name="fedavgm", momentum=0.0), weights, delta, state)
        assert weights.tolist() == plain.tolist()


def test_nine_tenths_if_not_given() -> None:
    weights, state = _vector(0), State()
    for _ in range(2):
        weights, state = step(ServerOptimizer(name="fedavgm"), weights, _delta(1), state)
    assert state["velocity"].tolist() == [pytest.approx(1.9)]
    assert weights.tolist() == [pytest.approx(2.9)]


def test_a_constant_push_is_amplified_up_to_its_limit() -> None:
    """v → Δ / (1 − β)."""
    weights, state = _vector(0), State()
    for _ in range(200):
        weights, state = step(ServerOptimizer(name="fedavgm", momentum=0.75), weights, _delta(1), state)
    assert state["velocity"].tolist() == [pytest.approx(4.0)]


def test_the_state_survives_a_checkpoint_to_the_bit() -> None:
    rng = np.random.default_rng(2)
    optimizer = ServerOptimizer(name="fedavgm", momentum=0.9, learning_rate=0.7)
    start = rng.normal(size=1000).astype(np.float32)
    kept, reloaded = (start, State()), (start, State())
    for _ in range(5):
        delta = rng.normal(size=1000)
        kept = step(optimizer, kept[0], delta, kept[1])
        weights, state = step(optimizer, reloaded[0], delta, reloaded[1])
        reloaded = weights, load(save(state))
        assert reloaded[0].tobytes() == kept[0].tobytes()
        assert reloaded[1]["velocity"].tobytes() == kept[1]["velocity"].tobytes()


# What is configured


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"name": "fedavg", "learning_rate": 0.5},
        {"name": "fedavgm"},
        {"name": "fedavgm", "momentum": 0.0},
        {"learning_rate": 1000},
    ],
)
def test_what_can_work(given: dict[str, object]) -> None:
    parse(given, ServerOptimizer, "server.yaml")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"momentum": 0.9}, "momentum 0.9 has no meaning for fedavg: say name: fedavgm, or remove momentum"),
        ({"name": "fedavg", "momentum": 0.0}, "momentum 0 has no meaning for fedavg"),
        ({"name": "fedavgm", "momentum": 1.0}, "momentum: 1.0 is not allowed: less than 1"),
        ({"name": "fedavgm", "momentum": -0.1}, "momentum: -0.1 is not allowed: greater than or equal to 0"),
        ({"name": "fedavgm", "momentum": float("nan")}, "momentum: nan is not allowed"),
        ({"name": "fedadam"}, "name: 'fedadam' is not allowed: 'fedavg' or 'fedavgm'"),
        ({"learning_rate": 0}, "learning_rate: 0 is not allowed: greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate: inf is not allowed"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(given, ServerOptimizer, "server.yaml")
    assert told in str(refused.value)

"""What a server optimizer carries, in a file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from choral.errors import ConfigError
from choral_server.optimizer_state import OptimizerState, StateWriter
from choral_server.strategies import State
from safetensors.numpy import load_file, save, save_file

SIZE = 1000


def _vectors(names: str) -> State:
    rng = np.random.default_rng(2)
    return {name: rng.normal(size=SIZE).astype(np.float32) for name in names}


@pytest.mark.parametrize("names", ["v", "vm"])
def test_parts_in_any_order_make_the_file_that_safetensors_would_write(tmp_path: Path, names: str) -> None:
    vectors, path = _vectors(names), tmp_path / "state"
    starts = list(range(0, SIZE, 300))
    random.Random(1).shuffle(starts)
    with StateWriter(path, SIZE) as writer:
        for start in starts:
            writer.write(start, {name: vector[start : start + 300] for name, vector in vectors.items()})
    assert path.read_bytes() == save(vectors)


def test_an_optimizer_that_carries_nothing_leaves_no_file(tmp_path: Path) -> None:
    with StateWriter(tmp_path / "state", SIZE) as writer:
        writer.write(0, {})
    assert not (tmp_path / "state").exists()


def test_parts_are_read_and_all_is_copied(tmp_path: Path) -> None:
    vectors = _vectors("vm")
    save_file(vectors, tmp_path / "state")
    state = OptimizerState(tmp_path / "state", SIZE, "here")
    part = state.part(300, 500)
    assert {name: vector.tolist() for name, vector in part.items()} == {n: v[300:500].tolist() for n, v in vectors.items()}
    state.copy(tmp_path / "copy")
    assert {name: vector.tolist() for name, vector in load_file(tmp_path / "copy").items()} == {
        name: vector.tolist() for name, vector in vectors.items()
    }


def test_a_state_that_does_not_belong_to_the_model_is_refused(tmp_path: Path) -> None:
    """NumPy would add a velocity of one element to any weights."""
    path = tmp_path / "state"
    for vector in (np.ones(1, np.float32), np.ones(3, np.float64)):
        save_file({"velocity": vector}, path)
        with pytest.raises(ConfigError, match=r"here: velocity is F\d\d \[\d\] where F32 \[3\] is expected"):
            OptimizerState(path, 3, "here")
    path.write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="here: is damaged"):
        OptimizerState(path, 3, "here")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from choral.errors import ConfigError
from choral.metrics import Metric
from choral.standardize import Standardize
from choral.statistics import Moments
from choral.table import Table
from choral.task import Task
from choral_server.global_model import GlobalModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset


def _standardized() -> nn.Module:
    return nn.Sequential(Standardize(2, keep=[1]), nn.Linear(2, 1))


def _task(model: object = _standardized) -> Task:
    return Task("plane", model, mse_loss, Table(["a", "b"], target="y"))  # type: ignore[arg-type]


MOMENTS = Moments.of(np.array([[1.0, 0.0], [5.0, 1.0]]))  # means 3 and ½, deviations 2 and ½


def test_initial_weights_are_those_of_the_task_and_seed() -> None:
    weights = GlobalModel(_task(), 7).weights
    assert weights.dtype == np.float32
    assert weights.shape == (3,)
    assert weights.tolist() == GlobalModel(_task(), 7).weights.tolist()
    assert weights.tolist() != GlobalModel(_task(), 8).weights.tolist()


def test_weights_are_taken_and_given_back() -> None:
    model = GlobalModel(_task(), 0)
    model.set_weights(np.array([1.0, 2.0, 3.0], np.float32))
    assert model.weights.tolist() == [1.0, 2.0, 3.0]


def test_how_many_features_a_statistics_round_measures() -> None:
    assert GlobalModel(_task(), 0).features == 2
    assert GlobalModel(_task(lambda: nn.Linear(2, 1)), 0).features is None


def test_with_the_statistics_it_predicts_from_raw_features() -> None:
    model = GlobalModel(_task(), 0)
    model.set_weights(np.array([1.0, 10.0, 0.5], np.float32))
    model.set_statistics(MOMENTS)
    # x = (7, 1): (7 − 3) / 2 = 2, and the second feature as it is: 2 + 10 + ½
    (loss,) = model.evaluate(TensorDataset(torch.tensor([[7.0, 1.0]]), torch.tensor([[12.5]])))
    assert loss == Metric("loss", 0.0, 1)
    assert model.weights.tolist() == [1.0, 10.0, 0.5]


def test_whether_the_statistics_are_in_it() -> None:
    model, plain = GlobalModel(_task(), 0), GlobalModel(_task(lambda: nn.Linear(2, 1)), 0)
    assert not model.standardizes
    for changed in (model, plain):
        changed.set_statistics(MOMENTS)
    assert model.standardizes
    assert not plain.standardizes


def test_statistics_of_a_model_that_wants_none_change_nothing() -> None:
    model = GlobalModel(_task(lambda: nn.Linear(2, 1)), 0)
    before = model.weights.tolist()
    model.set_statistics(MOMENTS)
    assert model.weights.tolist() == before


def _written(model: GlobalModel, folder: Path) -> Path:
    path = folder / "1.safetensors"
    path.write_bytes(model.to_bytes({"choral": "origin"}))
    return path


def test_a_checkpoint_holds_weights_statistics_and_metadata(tmp_path: Path) -> None:
    model = GlobalModel(_task(), 0)
    model.set_weights(np.array([1.0, 10.0, 0.5], np.float32))
    model.set_statistics(MOMENTS)
    path = _written(model, tmp_path)
    state = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    assert state == {"0.mean": [3.0, 0.0], "0.scale": [2.0, 1.0], "1.weight": [[1.0, 10.0]], "1.bias": [0.5]}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"choral": "origin"}
    plain = _standardized()
    plain.load_state_dict(load_file(path))
    assert plain(torch.tensor([[7.0, 1.0]])).item() == 12.5


def test_the_same_model_gives_the_same_file() -> None:
    assert GlobalModel(_task(), 3).to_bytes({"choral": "o"}) == GlobalModel(_task(), 3).to_bytes({"choral": "o"})


def test_a_checkpoint_is_taken_whole(tmp_path: Path) -> None:
    first, second = GlobalModel(_task(), 0), GlobalModel(_task(), 1)
    first.set_statistics(MOMENTS)
    second.load(_written(first, tmp_path))
    assert second.to_bytes({}) == first.to_bytes({})


def test_tied_and_strided_weights_are_written(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.decode.weight = self.encode.weight
            self.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)

    model = GlobalModel(_task(Tied), 0)
    again = GlobalModel(_task(Tied), 1)
    again.load(_written(model, tmp_path))
    assert again.weights.tolist() == model.weights.tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"1.weight": torch.zeros(1, 3)}, "tensor 1.weight is (torch.float32, (1, 3)) where (torch.float32, (1, 2)) is expected"),
        (
            {"1.weight": torch.zeros(1, 2, dtype=torch.float16)},
            "tensor 1.weight is (torch.float16, (1, 2)) where (torch.float32, (1, 2)) is expected",
        ),
        ({"1.bias": None}, "tensor 1.bias is missing where (torch.float32, (1,)) is expected"),
        ({"2.bias": torch.zeros(1)}, "tensor 2.bias is (torch.float32, (1,)) where nothing is expected"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused_with_the_first_difference(
    tmp_path: Path, change: dict[str, torch.Tensor | None], told: str
) -> None:
    model = GlobalModel(_task(), 0)
    before = model.weights.tolist()
    state = load_file(_written(model, tmp_path)) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError) as refused:
        model.load(tmp_path / "other.safetensors")
    assert str(refused.value) == f"{tmp_path / 'other.safetensors'}: is not of task plane 1: {told}; give the run another name"
    assert model.weights.tolist() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"1\.safetensors: "):
        GlobalModel(_task(), 0).load(path)

from __future__ import annotations

import numpy as np
import pytest
import torch
from choral.errors import TaskError
from choral.standardize import Standardize, standardize_of
from choral.statistics import Moments
from torch import nn


def _moments(*columns: list[float]) -> Moments:
    return Moments.of(np.array(columns).T)


def test_changes_nothing_until_it_is_filled() -> None:
    x = torch.tensor([[1.0, -2.0]])
    assert torch.equal(Standardize(2)(x), x)


def test_subtracts_the_mean_and_divides_by_the_deviation_except_where_told_to_keep() -> None:
    layer = Standardize(3, keep=[1])
    layer.fill(_moments([1.0, 3.0], [0.0, 1.0], [5.0, 5.0]))  # means 2, ½, 5; deviations 1, ½, 0
    assert layer.mean.tolist() == [2.0, 0.0, 5.0]
    assert layer.scale.tolist() == [1.0, 1.0, 1.0]
    assert layer(torch.tensor([[4.0, 1.0, 7.0]])).tolist() == [[2.0, 1.0, 2.0]]


def test_filled_with_its_own_data_it_gives_mean_0_and_deviation_1() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal([100, -3], [20, 0.01], (500, 2)).astype(np.float32))
    layer = Standardize(2)
    layer.fill(Moments.of(x.numpy()))
    standardized = layer(x)
    assert standardized.mean(dim=0).abs().max() < 1e-4
    assert (standardized.std(dim=0, unbiased=False) - 1).abs().max() < 1e-4


def test_filling_again_forgets_what_was_before() -> None:
    layer = Standardize(1)
    layer.fill(_moments([0.0, 8.0]))
    layer.fill(_moments([1.0, 5.0]))
    assert (layer.mean.item(), layer.scale.item()) == (3.0, 2.0)


def test_is_saved_with_the_model_and_not_trained() -> None:
    layer = Standardize(2)
    assert list(layer.state_dict()) == ["mean", "scale"]
    assert list(layer.parameters()) == []
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(("features", "keep"), [(0, []), (-1, []), (3, [3]), (3, [-1]), (3, [0, 7])])
def test_refuses_features_that_there_are_not(features: int, keep: list[int]) -> None:
    with pytest.raises(TaskError, match="keep holds indices from 0 to features - 1"):
        Standardize(features, keep)


def test_refuses_statistics_of_other_data() -> None:
    with pytest.raises(TaskError, match="statistics of 2 features for a layer of 3"):
        Standardize(3).fill(_moments([1.0], [2.0]))


def test_is_found_in_a_model() -> None:
    layer = Standardize(2)
    assert standardize_of(nn.Sequential(nn.Sequential(layer), nn.Linear(2, 1))) is layer
    assert standardize_of(layer) is layer
    assert standardize_of(nn.Linear(2, 1)) is None
    with pytest.raises(TaskError, match="2 Standardize layers"):
        standardize_of(nn.Sequential(Standardize(2), Standardize(2)))

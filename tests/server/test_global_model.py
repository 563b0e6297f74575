"""The model on the disk: what it becomes is what torch would make of it, bit for bit, though it is never whole in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choral.errors import ConfigError
from choral.metrics import Metric
from choral.standardize import Standardize
from choral.statistics import Moments
from choral_server import checkpoint_file, global_model
from choral_server.global_model import GlobalModel
from choral_server.task_host import TaskHost
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from server.home import PLAIN, Here
from torch import nn
from torch.utils.data import TensorDataset
from vectors import flatten, unflatten


def _standardized() -> nn.Module:
    return nn.Sequential(Standardize(2, keep=[1]), nn.Linear(2, 1))


class Mixed(nn.Module):
    """Every floating-point type, a counter, a flag, a scalar, nothing at all, and names that JSON escapes."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
            self.register_buffer(f"of_{str(dtype).rpartition('.')[2]}", torch.randn(3, 5).to(dtype))
        self.register_buffer("größe", torch.randn(()))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("long", torch.randn(2, 11))


MOMENTS = Moments.of(np.array([[1.0, 0.0], [5.0, 1.0]]))  # means 3 and ½, deviations 2 and ½
STANDARDIZED = replace(PLAIN, model=_standardized)
METADATA = {"choral": '{"run": "größe", "version": 1}'}


async def _begun(folder: Path, model: Callable[[], nn.Module] = _standardized, seed: int = 0) -> GlobalModel:
    """A model with its initial weights."""
    code = Here(replace(PLAIN, model=model), seed)
    await code.write_initial(folder / "0.safetensors", {"choral": "before"})
    begun = GlobalModel(code.blueprint)
    begun.load(folder / "0.safetensors")
    return begun


def _moved(change: NDArray[np.float32]) -> global_model.Step:
    return lambda weights, start: weights + change[start : start + weights.size]


async def test_initial_weights_are_those_of_the_task_and_seed(tmp_path: Path) -> None:
    for seed in (7, 8):
        await _begun(tmp_path, seed=seed)
        state = load_file(tmp_path / "0.safetensors")
        expected = STANDARDIZED.initial_model(seed).state_dict()
        assert {name: tensor.tolist() for name, tensor in state.items()} == {n: t.tolist() for n, t in expected.items()}


async def test_how_many_features_a_statistics_round_measures(tmp_path: Path) -> None:
    assert (await _begun(tmp_path)).features == 2
    assert (await _begun(tmp_path, lambda: nn.Linear(2, 1))).features is None


@pytest.mark.parametrize("block", [4, 1 << 18], ids=["in blocks", "at once"])
async def test_a_step_gives_what_torch_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """All types, and all that is not averaged as it was; the file is to the byte the one that safetensors would write."""
    monkeypatch.setattr(global_model, "BLOCK", block)
    monkeypatch.setattr(checkpoint_file, "BLOCK", block)
    model = await _begun(tmp_path, Mixed)
    before = load_file(tmp_path / "0.safetensors")
    change = np.random.default_rng(3).normal(size=model.manifest.size).astype(np.float32)
    digest = model.write_trained(tmp_path / "1.safetensors", METADATA, _moved(change))
    content = (tmp_path / "1.safetensors").read_bytes()
    assert content == save(unflatten(flatten(before, model.manifest) + change, before, model.manifest), METADATA)
    assert digest == hashlib.sha256(content).digest()
    assert load_file(tmp_path / "1.safetensors")["steps"].item() == 7
    assert not torch.equal(load_file(tmp_path / "1.safetensors")["of_bfloat16"], before["of_bfloat16"])


async def test_a_model_of_several_blocks_has_no_seam(tmp_path: Path) -> None:
    model = await _begun(tmp_path, lambda: nn.Linear(600_000, 1))
    change = np.arange(model.manifest.size, dtype=np.float32)
    digest = model.write_trained(tmp_path / "1.safetensors", METADATA, _moved(change))
    content = (tmp_path / "1.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).digest()
    before = load_file(tmp_path / "0.safetensors")
    assert content == save(unflatten(flatten(before, model.manifest) + change, before, model.manifest), METADATA)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
async def test_statistics_fill_the_layer_as_torch_would(tmp_path: Path, dtype: torch.dtype) -> None:
    model = await _begun(tmp_path, lambda: _standardized().to(dtype))
    model.write_standardized(tmp_path / "1.safetensors", METADATA, MOMENTS)
    expected = STANDARDIZED.initial_model(0).to(dtype)
    assert isinstance(expected, nn.Sequential)
    assert isinstance(expected[0], Standardize)
    expected[0].fill(MOMENTS)
    assert (tmp_path / "1.safetensors").read_bytes() == save(expected.state_dict(), METADATA)


async def test_with_the_statistics_it_predicts_from_raw_features(tmp_path: Path) -> None:
    model = await _begun(tmp_path)
    path = tmp_path / "1.safetensors"
    model.write_standardized(path, METADATA, MOMENTS)
    model.load(path)
    wanted = np.array([1.0, 10.0, 0.5], np.float32)
    path = tmp_path / "2.safetensors"
    model.write_trained(path, METADATA, lambda weights, start: wanted[start : start + weights.size])
    state = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    assert state == {"0.mean": [3.0, 0.0], "0.scale": [2.0, 1.0], "1.weight": [[1.0, 10.0]], "1.bias": [0.5]}
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    # x = (7, 1): (7 − 3) / 2 = 2, and the second feature as it is: 2 + 10 + ½
    test_set = TensorDataset(torch.tensor([[7.0, 1.0]]), torch.tensor([[12.5]]))
    assert TaskHost(STANDARDIZED, 0, test_set).measure(path) == (Metric("loss", 0.0, 1),)


async def test_whether_the_statistics_are_in_it(tmp_path: Path) -> None:
    for model, has in ((_standardized, True), (lambda: nn.Linear(2, 1), False)):
        begun = await _begun(tmp_path, model)
        assert not begun.standardizes
        begun.write_standardized(tmp_path / "1.safetensors", METADATA, MOMENTS)
        begun.load(tmp_path / "1.safetensors")
        assert begun.standardizes is has


async def test_statistics_of_a_model_that_wants_none_change_nothing(tmp_path: Path) -> None:
    model = await _begun(tmp_path, lambda: nn.Linear(2, 1))
    model.write_standardized(tmp_path / "1.safetensors", {"choral": "before"}, MOMENTS)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "0.safetensors").read_bytes()


async def test_a_model_is_copied_whole(tmp_path: Path) -> None:
    model = await _begun(tmp_path, Mixed)
    model.write(tmp_path / "1.safetensors", METADATA)
    assert (tmp_path / "1.safetensors").read_bytes() == save(load_file(tmp_path / "0.safetensors"), METADATA)


async def test_what_it_has_loaded_it_keeps_when_the_file_goes(tmp_path: Path) -> None:
    """Old versions are deleted, and a folder may be moved."""
    model = await _begun(tmp_path, Mixed)
    content = (tmp_path / "0.safetensors").read_bytes()
    (tmp_path / "0.safetensors").unlink()
    model.write(tmp_path / "1.safetensors", {"choral": "before"})
    assert (tmp_path / "1.safetensors").read_bytes() == content


async def test_a_file_that_was_cut_short_meanwhile_is_no_model_of_zeros(tmp_path: Path) -> None:
    model = await _begun(tmp_path, Mixed)
    with (tmp_path / "0.safetensors").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(OSError, match="it was cut short"):
        model.write(tmp_path / "1.safetensors", METADATA)


async def test_tied_and_strided_weights_are_written(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.decode.weight = self.encode.weight
            self.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)

    model = await _begun(tmp_path, Tied)
    change = np.array([0] * 6 + [1, 2, 3, 4] * 2, np.float32)  # in the order of the state dict
    model.write_trained(tmp_path / "1.safetensors", METADATA, _moved(change))
    before, after = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    assert torch.equal(after["encode.weight"], after["decode.weight"])
    assert torch.equal(after["encode.weight"], before["encode.weight"] + torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert after["strided"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    Tied().load_state_dict(after)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"1.weight": torch.zeros(1, 3)}, "tensor 1.weight is F32 [1, 3] where F32 [1, 2] is expected"),
        ({"1.weight": torch.zeros(1, 2, dtype=torch.float16)}, "tensor 1.weight is F16 [1, 2] where F32 [1, 2] is expected"),
        ({"1.bias": None}, "tensor 1.bias is missing where F32 [1] is expected"),
        ({"2.bias": torch.zeros(1)}, "tensor 2.bias is F32 [1] where nothing is expected"),
    ],
)
async def test_the_checkpoint_of_another_model_is_refused_with_the_first_difference(
    tmp_path: Path, change: dict[str, torch.Tensor | None], told: str
) -> None:
    model = await _begun(tmp_path)
    state: dict[str, Any] = load_file(tmp_path / "0.safetensors") | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError) as refused:
        model.load(tmp_path / "other.safetensors")
    assert str(refused.value) == f"{tmp_path / 'other.safetensors'}: is not of task plane 1: {told}; give the run another name"
    model.write(tmp_path / "1.safetensors", {"choral": "before"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "0.safetensors").read_bytes()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", save({"weight": torch.zeros(1, 2)})[:-1]])
async def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"1\.safetensors: "):
        GlobalModel(Here(PLAIN, 0).blueprint).load(path)


async def test_no_noise_makes_a_variance_negative(tmp_path: Path) -> None:
    model = await _begun(tmp_path, lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    model.write_trained(tmp_path / "1.safetensors", {}, lambda weights, _: weights - np.float32(0.25) * 8)
    before, after = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    assert after["1.running_var"].tolist() == [0.0] * 3
    for name in ("0.weight", "1.weight", "1.running_mean"):
        assert torch.equal(after[name], before[name] - 2)
    assert torch.equal(after["1.num_batches_tracked"], before["1.num_batches_tracked"])

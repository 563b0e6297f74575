from __future__ import annotations

import numpy as np
import pytest
import torch
from choral.errors import TaskError
from choral.flat import DTYPES, describe
from choral.manifest import Entry, EntryKind
from choral.standardize import Standardize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from vectors import flatten, unflatten

AVERAGED, COUNTER, STATISTIC = EntryKind.AVERAGED, EntryKind.COUNTER, EntryKind.STATISTIC


class Buffers(nn.Module):
    """A model that is nothing but a state dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_describes_and_flattens_in_the_order_of_the_state_dict() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    manifest = describe(model)
    assert manifest.entries == (
        Entry("0.weight", "F32", (1, 2), 0, AVERAGED),
        Entry("0.bias", "F32", (1,), 2, AVERAGED),
        Entry("1.weight", "F32", (1,), 3, AVERAGED),
        Entry("1.bias", "F32", (1,), 4, AVERAGED),
        Entry("1.running_mean", "F32", (1,), 5, AVERAGED),
        Entry("1.running_var", "F32", (1,), 6, AVERAGED),
        Entry("1.num_batches_tracked", "I64", (), 0, COUNTER),
    )
    assert manifest.size == 7
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.5, -2.0]]))
        model[0].bias.fill_(3.0)
    flat = flatten(model.state_dict(), manifest)
    assert flat.dtype == np.float32
    assert flat.tolist() == [1.5, -2.0, 3.0, 1.0, 0.0, 0.0, 1.0]


def test_counters_are_never_averaged() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    model(torch.randn(4, 2))
    state, manifest = model.state_dict(), describe(model)
    assert int(state["1.num_batches_tracked"]) == 1
    new = unflatten(np.full(manifest.size, 0.5, np.float32), state, manifest)
    assert new["1.num_batches_tracked"].dtype is torch.int64
    assert int(new["1.num_batches_tracked"]) == 1
    assert float(new["1.running_mean"]) == 0.5


def test_statistics_keep_the_coordinators_value() -> None:
    model = nn.Sequential(nn.Sequential(Standardize(2)), nn.Linear(2, 1))
    manifest = describe(model)
    assert [entry.kind for entry in manifest.entries] == [STATISTIC, STATISTIC, AVERAGED, AVERAGED]
    new = unflatten(np.full(manifest.size, 9.0, np.float32), model.state_dict(), manifest)
    assert new["0.0.mean"].tolist() == [0.0, 0.0]
    assert new["0.0.scale"].tolist() == [1.0, 1.0]


def test_a_flat_vector_is_a_copy() -> None:
    model = nn.Linear(1, 1)
    manifest = describe(model)
    flat = flatten(model.state_dict(), manifest)
    new = unflatten(flat, model.state_dict(), manifest)
    flat[:] = 7.0
    assert model.weight.item() != 7.0
    assert new["weight"].item() == model.weight.item()


def test_bfloat16_is_widened_exactly_and_narrowed_to_the_nearest() -> None:
    model = Buffers({"w": torch.tensor([1.0, -3.140625, 2.0**-100], dtype=torch.bfloat16)})
    manifest = describe(model)
    flat = flatten(model.state_dict(), manifest)
    assert flat.tolist() == [1.0, -3.140625, 2.0**-100]
    new = unflatten(np.array([1.001, 0, 0], np.float32), model.state_dict(), manifest)["w"]
    assert new.dtype is torch.bfloat16
    assert new.tolist() == [1.0, 0.0, 0.0]  # eight bits of precision: the step above 1 is 1/128


def test_float64_passes_through_float32() -> None:
    third = torch.tensor([1 / 3, 0.5], dtype=torch.float64)
    model = Buffers({"w": third})
    manifest = describe(model)
    assert manifest.entries == (Entry("w", "F64", (2,), 0, AVERAGED),)
    new = unflatten(flatten(model.state_dict(), manifest), model.state_dict(), manifest)["w"]
    assert new.dtype is torch.float64
    assert new.tolist() == [float(np.float32(1 / 3)), 0.5]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(2, 2, bias=False)
            self.decode = nn.Linear(2, 2, bias=False)
            self.decode.weight = self.encode.weight

    model = Tied()
    manifest = describe(model)
    assert [entry.offset for entry in manifest.entries] == [0, 4]
    flat = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.float32)
    model.load_state_dict(unflatten(flat, model.state_dict(), manifest))
    assert model.decode.weight is model.encode.weight
    assert model.encode.weight.tolist() == [[1, 2], [3, 4]]
    assert flatten(model.state_dict(), manifest).tolist() == flat.tolist()


def test_transposed_and_other_strided_tensors_flatten_in_row_order() -> None:
    model = Buffers({"w": torch.arange(6, dtype=torch.float32).reshape(2, 3).T})
    assert flatten(model.state_dict(), describe(model)).tolist() == [0, 3, 1, 4, 2, 5]


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES, key=str)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**32),
)
def test_any_state_dict_round_trips(described: list[tuple[torch.dtype, list[int]]], seed: int) -> None:
    """Whole numbers from 0 to 100 are exact in every type, so nothing may change."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{index}": torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)
        for index, (dtype, shape) in enumerate(described)
    }
    model = Buffers({"always": torch.zeros(1), **tensors})
    manifest, state = describe(model), model.state_dict()
    flat = flatten(state, manifest)
    assert [entry.name for entry in manifest.entries] == list(state)
    assert len(flat) == manifest.size == sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    blank = {name: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    again = unflatten(flat, blank, manifest)
    assert list(again) == list(state)
    for name, tensor in state.items():
        assert again[name].dtype is tensor.dtype
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_refuses_a_type_that_cannot_be_sent(dtype: torch.dtype) -> None:
    with pytest.raises(TaskError, match=rf"tensor 'w' of the model is {dtype}; allowed are torch.float64"):
        describe(Buffers({"w": torch.zeros(1).to(dtype)}))


@pytest.mark.parametrize("model", [nn.ReLU(), Standardize(3), Buffers({"steps": torch.zeros(2, dtype=torch.int64)})])
def test_refuses_a_model_without_anything_to_average(model: nn.Module) -> None:
    with pytest.raises(TaskError, match="nothing to average"):
        describe(model)

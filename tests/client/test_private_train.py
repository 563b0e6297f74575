"""Private local training: how far one example can move a step, how much noise is on it, and that it learns all the same."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from choral import Standardize, Task, Training
from choral.errors import Declined
from choral.privacy.accounting import Accountant, Release, Sampling, epsilon
from choral.privacy.noise import STEPS, Bits
from choral_client import private_train
from choral_client.private_train import ExampleGradients, Steps, check_model, clipped_sum, fit_privately, steps_of
from choral_client.train import Stopped
from opacus import GradSampleModule  # type: ignore[import-untyped]
from opacus.accountants import PRVAccountant, RDPAccountant  # type: ignore[import-untyped]
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, TensorDataset

SURELY = 1e-9
"""a test that chance fails so seldom is not repeated"""
CLIP, NOISE, DELTA = 0.7, 1.3, 1e-5
GRID = STEPS / NOISE
"""steps in a clip"""


def task(model: nn.Module, loss: Any = mse_loss, optimizer: Any = None) -> Task:
    return Task("some", lambda: model, loss, lambda path: TensorDataset(), **({"optimizer": optimizer} if optimizer else {}))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(4 * 5, 3))


class Recurrent(nn.Module):
    """A layer that torch cannot vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.layer(x.reshape(len(x), 3, 2))[0][:, -1])


class Branching(nn.Module):
    """Its way depends on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.one(x) if x.sum() > 0 else self.other(x)


class Sparse(nn.Module):
    """Its gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Embedding(11, 5, sparse=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.rows(x).mean(dim=1))


class Tied(nn.Module):
    """Two layers of the same weights, a frozen parameter, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen, self.unused = nn.Parameter(torch.ones(6), requires_grad=False), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        return (self.second(self.first(x)) * self.frozen)[:, :3]


def words(count: int) -> Tensor:
    return torch.randint(0, 11, (count, 4))


def rows(count: int) -> Tensor:
    return torch.randn(count, 6)


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8)


def classes(count: int) -> Tensor:
    return torch.randint(0, 3, (count,))


@pytest.fixture(autouse=True)
def _seeded() -> Iterable[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Each example's gradients, by backward() on a batch of it."""
    found = list[list[Tensor]]()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for start in range(len(x)):
        model.zero_grad()
        cross_entropy(model(x[start : start + 1]), y[start : start + 1]).backward()  # type: ignore[no-untyped-call]
        found.append([(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).clone() for p in trained])
    model.zero_grad()
    return [torch.stack(each) for each in zip(*found, strict=True)]


def clipped(gradients: Iterable[Tensor], clip: float = CLIP) -> Tensor:
    """The sum of clipped gradients in float64, without a grid."""
    flat = torch.cat([gradient.flatten(1).double() for gradient in gradients], dim=1)
    shrunk: Tensor = flat * (clip / flat.norm(dim=1, keepdim=True)).clamp(max=1)
    return shrunk.sum(dim=0)


def close(whole: Tensor, expected: Tensor, step: float = CLIP / GRID) -> bool:
    """To the precision of float32."""
    return bool((whole * step - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize(("build", "inputs"), [(mlp, rows), (convolutions, images), (embedding, words)])
@pytest.mark.parametrize("clip", [0.05, CLIP, 10.0], ids=["all are clipped", "some are", "none is"])
def test_the_sum_of_clipped_gradients_is_that_of_opacus(build: Callable[[], nn.Module], inputs: Any, clip: float) -> None:
    model, x, y = build(), inputs(24), classes(24)
    ours = clipped_sum(ExampleGradients(task(model, cross_entropy), model)(x, y), clip, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on inputs that need no gradient
        theirs = GradSampleModule(model, loss_reduction="mean")
        cross_entropy(theirs(x), y).backward()  # type: ignore[no-untyped-call]
    expected = clipped((parameter.grad_sample for parameter in theirs.parameters()), clip)
    assert close(ours, expected, clip / STEPS)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("build", "inputs", "vectorised"),
    [
        (mlp, rows, True),
        (convolutions, images, True),
        (embedding, words, True),
        (Tied, rows, True),
        (Recurrent, rows, False),
        (Branching, rows, False),
        (Sparse, words, False),
    ],
)
def test_what_cannot_be_vectorised_is_computed_one_by_one_to_the_same(
    build: Callable[[], nn.Module], inputs: Any, vectorised: bool
) -> None:
    model, x, y = build(), inputs(12), classes(12)
    made = [ExampleGradients(task(model, cross_entropy), model, at_once) for at_once in (True, False)]
    with structlog.testing.capture_logs() as logged:
        at_once, again, one_by_one = made[0](x, y), made[0](x, y), made[1](x, y)
    assert [entry["log_level"] for entry in logged] == ([] if vectorised else ["info"])  # decided once, told once
    expected = clipped(by_hand(model, x, y))
    for gradients in (at_once, again, one_by_one):
        assert close(clipped_sum(gradients, CLIP, GRID), expected)


def test_an_example_that_breaks_the_tasks_code_counts_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the work ended, or its update were another, that would tell of this example; the owner reads it in the log."""
    silence(monkeypatch)
    x, y = rows(6), classes(6)
    y[2] = 10**6  # no class
    others = torch.arange(6) != 2
    trained, initial = [], mlp().state_dict()
    for examples in (TensorDataset(x, y), TensorDataset(x[others], y[others])):
        model = mlp()
        model.load_state_dict(initial)
        with structlog.testing.capture_logs() as logged:
            fit_privately(task(model, cross_entropy), model, examples, Training(batch_size=len(examples)), NOISE, CLIP, 0)
        told = [entry["event"] for entry in logged if entry["log_level"] == "warning"]
        assert told == (["an example counts as nothing"] if len(examples) == 6 else [])
        trained.append(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]))
    begun = torch.cat([value.reshape(-1) for value in initial.values()])
    assert (trained[0] - begun) * 6 == pytest.approx((trained[1] - begun) * 5, abs=1e-5)


class Torn(Dataset[Any]):
    """Of its examples one cannot be read."""

    def __init__(self, whole: TensorDataset, torn: int) -> None:
        self._whole, self._torn = whole, torn

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, number: int) -> Any:
        if number == self._torn:
            raise OSError("a bad sector")
        return self._whole[number]


def test_an_example_that_cannot_be_read_counts_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    silence(monkeypatch)
    whole, model = TensorDataset(rows(5), classes(5)), mlp()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with structlog.testing.capture_logs() as logged:
        fit_privately(task(model, cross_entropy), model, Torn(whole, 3), Training(batch_size=5), NOISE, CLIP, 0)
    assert [entry["reason"] for entry in logged if entry["log_level"] == "warning"] == ["OSError: a bad sector"]
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_how_many_are_computed_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than there is memory for, and no more than two batches."""
    sizes, trained = list[int](), list[Tensor]()
    compute = ExampleGradients.__call__

    def noting(self: ExampleGradients, x: Tensor, y: Tensor) -> list[Tensor]:
        sizes.append(len(x))
        return compute(self, x, y)

    monkeypatch.setattr(ExampleGradients, "__call__", noting)
    silence(monkeypatch)
    data, initial = TensorDataset(rows(9), classes(9)), mlp().state_dict()
    for at_once in (9, 4, 1, 0):
        model = mlp()
        model.load_state_dict(initial)
        monkeypatch.setattr(private_train, "_MICROBATCH_BYTES", 4 * elements(model) * at_once + 1)
        fit_privately(task(model, cross_entropy), model, data, Training(batch_size=9, learning_rate=1.0), NOISE, CLIP, 0)
        trained.append(flat(model))
    assert sizes == [9, 4, 4, 1] + 18 * [1]
    for weights in trained[1:]:
        assert (weights - trained[0]).norm() < 1e-5


def elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise at all, so that what it is put on can be seen."""
    monkeypatch.setattr(private_train, "gaussian", lambda: lambda count: np.zeros(count, np.int64))


def hostile(size: int) -> list[Tensor]:
    """Gradients that are to move the sum as far as they can."""
    spike, edge = torch.zeros(size, dtype=torch.float64), torch.full((size,), CLIP / math.sqrt(size), dtype=torch.float64)
    spike[0] = 1e300
    half = torch.full((size,), 0.5 * CLIP / GRID, dtype=torch.float64)
    over = torch.nextafter(edge, torch.tensor(math.inf, dtype=torch.float64))
    tiny = torch.full((size,), 1e-300, dtype=torch.float64)
    broken = [torch.full((size,), value) for value in (math.nan, math.inf, -math.inf, 3e38)]
    return [spike, -spike, edge, over, half, 3 * half, tiny, 1e6 * torch.randn(size), *broken]


@pytest.mark.parametrize(
    ("size", "steps"), [*product([1, 2, 17, 1000], [STEPS / 0.05, GRID, STEPS / 40]), (300_000, GRID), (300_000, STEPS / 1e4)]
)
def test_no_gradient_is_longer_than_the_clip_however_it_is_made(size: int, steps: float) -> None:
    for gradient in hostile(size):
        whole = clipped_sum([gradient[None]], CLIP, steps)
        assert whole.dtype == torch.int64
        assert whole.double().norm() <= steps
        if not gradient.isfinite().all():
            assert not whole.any()
    others = torch.randn(5, size)
    before, longest = clipped_sum([others], CLIP, steps), clipped_sum([1e6 * torch.ones(1, size)], CLIP, steps).double().norm()
    assert longest > steps * (1 - 1e-5) - math.sqrt(size)  # it is hardly shortened by more
    for gradient in hostile(size):
        assert (clipped_sum([torch.cat([others, gradient[None]])], CLIP, steps) - before).double().norm() <= steps


@pytest.mark.parametrize("value", [0.0, 1e4, -1e30, 3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("build", [mlp, Branching])
def test_one_example_moves_the_sum_by_the_clip_and_no_further(build: Callable[[], nn.Module], value: float) -> None:
    model, x, y = build(), rows(9), classes(9)
    x[4] = value
    others = [index for index in range(9) if index != 4]
    gradients = ExampleGradients(task(model, cross_entropy), model)
    before = clipped_sum(gradients(x[others], y[others]), CLIP, GRID)
    moved = (clipped_sum(gradients(x, y), CLIP, GRID) - before).double().norm()
    assert moved <= GRID * (1 if build is Branching else 1 + 1e-5)  # at once, the others may differ in their last bits


def test_a_broken_example_counts_for_nothing_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone is drawn and there is no noise: w − w' is the clipped sum of the others, over all that were expected."""
    silence(monkeypatch)
    model, x, y = mlp(), rows(5), classes(5)
    expected = clipped(by_hand(model, x[1:], y[1:])) / 5
    x[0], before = math.nan, flat(model)
    training = Training(batch_size=5, learning_rate=1.0)
    assert fit_privately(task(model, cross_entropy), model, TensorDataset(x, y), training, NOISE, CLIP, 0) == Steps(1.0, 1)
    assert (before - flat(model) - expected).norm() < 1e-6


def zero_gradient(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction * 0).sum()


@pytest.mark.parametrize(("batch_size", "epochs"), [(10, 1), (4, 1), (20, 2), (1, 1)])
def test_the_noise_is_what_was_promised_however_many_are_drawn(batch_size: int, epochs: int) -> None:
    """Of gradients that are all zero what is left is the noise: χ² with as many degrees as elements."""
    model = nn.Linear(200, 100)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    training = Training(epochs=epochs, batch_size=batch_size, learning_rate=1.0)
    steps = fit_privately(
        task(model, zero_gradient), model, TensorDataset(torch.randn(10, 200), rows(10)), training, NOISE, CLIP, 0
    )
    moved = flat(model).numpy() * min(batch_size, 10) / (NOISE * CLIP * math.sqrt(steps.count))
    assert steps.count == epochs * math.ceil(10 / batch_size)
    assert SURELY < stats.chi2.cdf(np.square(moved).sum(), moved.size) < 1 - SURELY
    assert stats.kstest(moved, "norm").pvalue > SURELY


class Noting(Dataset[Any]):
    """Examples that note when they are read."""

    def __init__(self, count: int) -> None:
        self.seen = list[int]()
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return torch.ones(6), torch.ones(1)


def test_each_example_is_drawn_by_itself_and_a_step_may_have_none() -> None:
    examples, ends, model = Noting(5), list[int](), nn.Linear(6, 1)

    class Stepping(torch.optim.SGD):
        def step(self, *_: Any) -> None:  # type: ignore[override]
            ends.append(len(examples.seen))
            super().step()

    training = Training(epochs=100, batch_size=2, learning_rate=1e-6)
    steps = fit_privately(task(model, optimizer=Stepping), model, examples, training, NOISE, CLIP, 0)
    assert steps == Steps(2 / 5, 300)
    sizes = np.diff([0, *ends])
    assert len(sizes) == steps.count
    assert sizes.min() == 0  # that none of the steps is empty has a chance of 3e-11
    for size in range(6):
        assert stats.binomtest(int((sizes == size).sum()), steps.count, stats.binom.pmf(size, 5, steps.rate)).pvalue > SURELY
    for count in np.bincount(examples.seen, minlength=5):
        assert stats.binomtest(int(count), steps.count, steps.rate).pvalue > SURELY


@pytest.mark.parametrize(("examples", "batch_size"), [(7, 3), (7, 7), (7, 100), (1, 1), (1000, 1), (3, 2)])
def test_the_rate_of_inclusion(examples: int, batch_size: int) -> None:
    bits, draws = Bits(), 20_000 // examples
    drawn = [private_train._drawn(bits, examples, batch_size) for _ in range(draws)]
    assert all(len(set(index.tolist())) == len(index) for index in drawn)
    rate = steps_of(examples, Training(batch_size=batch_size)).rate
    assert stats.binomtest(sum(len(index) for index in drawn), draws * examples, rate).pvalue > SURELY


def test_two_examples_are_drawn_independently() -> None:
    bits = Bits()
    both = np.array([[i in index for i in (0, 1)] for index in (private_train._drawn(bits, 4, 1).tolist() for _ in range(20_000))])
    table = np.bincount(2 * both[:, 0] + both[:, 1], minlength=4)
    assert stats.chisquare(table, np.array([9, 3, 3, 1]) / 16 * len(both)).pvalue > SURELY


@pytest.mark.parametrize(
    ("examples", "training", "expected"),
    [
        (100, Training(epochs=3, batch_size=8), Steps(0.08, 39)),
        (96, Training(epochs=1, batch_size=8), Steps(1 / 12, 12)),
        (5, Training(epochs=4, batch_size=8), Steps(1.0, 4)),
        (5, Training(epochs=0, batch_size=2), Steps(0.4, 0)),
    ],
)
def test_what_is_done_is_known_before(examples: int, training: Training, expected: Steps) -> None:
    assert steps_of(examples, training) == expected
    model = nn.Linear(6, 1)
    data = TensorDataset(rows(examples), torch.randn(examples, 1))
    before = flat(model)
    assert fit_privately(task(model), model, data, training, NOISE, CLIP, 0) == expected
    assert (flat(model) == before).all() == (expected.count == 0)


REFUSED = [
    (nn.BatchNorm1d(3), "mixes examples"),
    (nn.BatchNorm2d(3), "mixes examples"),
    (nn.BatchNorm3d(3), "mixes examples"),
    (nn.BatchNorm1d(3, track_running_stats=False), "mixes examples"),
    (nn.SyncBatchNorm(3), "mixes examples"),
    (nn.LazyBatchNorm1d(), "mixes examples"),
    (nn.LazyBatchNorm2d(), "mixes examples"),
    (nn.LazyBatchNorm3d(), "mixes examples"),
    (nn.InstanceNorm1d(3, track_running_stats=True), "keeps statistics of the examples"),
    (nn.InstanceNorm2d(3, track_running_stats=True), "keeps statistics of the examples"),
    (nn.InstanceNorm3d(3, track_running_stats=True), "keeps statistics of the examples"),
    (nn.LazyInstanceNorm2d(track_running_stats=True), "keeps statistics of the examples"),
]


@pytest.mark.parametrize(("layer", "what"), REFUSED, ids=[type(layer).__name__ for layer, _ in REFUSED])
def test_a_layer_that_mixes_examples_is_refused_with_the_cure(layer: nn.Module, what: str) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), layer))
    said = f"layer 1.1 is a {type(layer).__name__}, which {what}: use nn.GroupNorm or nn.LayerNorm, or choral's Standardize"
    with pytest.raises(Declined, match=said):
        check_model(model)
    with pytest.raises(Declined, match=f"the model is a {type(layer).__name__}, which {what}"):
        check_model(layer)
    with pytest.raises(Declined, match=said):
        fit_privately(task(model), model, TensorDataset(rows(3), rows(3)), Training(), NOISE, CLIP, 0)


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3, affine=True), nn.Dropout(), Standardize(3), nn.LSTM(3, 3)]
)
def test_layers_that_treat_each_example_alone_are_not_refused(layer: nn.Module) -> None:
    check_model(nn.Sequential(nn.Linear(3, 3), layer))


def test_a_model_that_has_nothing_to_train_is_refused() -> None:
    with pytest.raises(Declined, match="no trainable parameters"):
        check_model(nn.Linear(3, 3).requires_grad_(False))


class Remembering(nn.Module):
    """It writes what it is given into a buffer, a frozen parameter or its own weights, by one way or another."""

    memory: Tensor
    count: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(6, 3)
        self.register_buffer("memory", torch.zeros(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        if self.way == "assigned":
            self.memory = 0.9 * self.memory + x.detach().mean(dim=0) / 2
        elif self.way == "in place":
            self.memory.mul_(0.9).add_(x.detach().mean(dim=0) / 2)
        elif self.way == "frozen":
            self.frozen.add_(x.detach().mean(dim=0) / 2)
        else:
            self.layer.bias.data.add_(x.detach().mean())
        return self.layer(x - self.memory - self.frozen)


@pytest.mark.parametrize("way", ["assigned", "in place", "frozen", "weights"])
@pytest.mark.parametrize("vectorised", [True, False])
def test_what_a_forward_pass_writes_into_the_model_is_not_kept(way: str, vectorised: bool) -> None:
    """Nor does one example see what another wrote."""
    model, x, y = Remembering(way), rows(6), classes(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = ExampleGradients(task(model, cross_entropy), model, vectorised)
    together = gradients(x, y)
    for index in range(6):
        alone = gradients(x[index : index + 1], y[index : index + 1])
        assert all(torch.allclose(one[0], several[index], atol=1e-6) for one, several in zip(alone, together, strict=True))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    fit_privately(task(model, cross_entropy), model, TensorDataset(x, y), Training(batch_size=6), NOISE, CLIP, 0)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("build", [mlp, Branching])
def test_a_frozen_parameter_stays_and_the_buffers_of_standardize_too(build: Callable[[], nn.Module]) -> None:
    standardize, rest = Standardize(6), build()
    standardize.mean += 2
    model, frozen = nn.Sequential(standardize, rest), next(rest.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = TensorDataset(rows(20), classes(20))
    fit_privately(task(model, cross_entropy), model, data, Training(epochs=2), NOISE, CLIP, 0)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert frozen.grad is None
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_work_that_is_stopped_ends_before_the_next_step() -> None:
    stop, steps = threading.Event(), 0

    class Stepping(torch.optim.SGD):
        def step(self, *_: Any) -> None:  # type: ignore[override]
            nonlocal steps
            steps += 1
            if steps == 3:
                stop.set()
            super().step()

    model, data = nn.Linear(6, 1), TensorDataset(rows(20), torch.randn(20, 1))
    with pytest.raises(Stopped):
        fit_privately(task(model, optimizer=Stepping), model, data, Training(epochs=1000, batch_size=20), NOISE, CLIP, 0, stop)
    assert steps == 3


def test_a_step_is_not_ended_once_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_train, "_MICROBATCH_BYTES", 1)
    stop, model, computed = threading.Event(), Branching(), 0

    def stopping(prediction: Tensor, y: Tensor) -> Tensor:
        nonlocal computed
        computed += 1
        stop.set()
        return cross_entropy(prediction, y)

    before = flat(model)
    with pytest.raises(Stopped):
        fit_privately(
            task(model, stopping), model, TensorDataset(rows(50), classes(50)), Training(batch_size=50), NOISE, CLIP, 0, stop
        )
    assert computed == 1
    assert flat(model).equal(before)


def test_what_was_random_in_the_model_is_not_known_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    silence(monkeypatch)
    dropping, data = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3)), TensorDataset(rows(4), classes(4))
    initial, trained = {name: value.clone() for name, value in dropping.state_dict().items()}, list[Tensor]()
    state = torch.get_rng_state()
    for _ in range(2):
        dropping.load_state_dict(initial)
        fit_privately(task(dropping, cross_entropy), dropping, data, Training(batch_size=4), NOISE, CLIP, 7)
        trained.append(flat(dropping))
    assert not trained[0].equal(trained[1])
    assert torch.get_rng_state().equal(state)


def test_each_example_has_a_dropout_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    x, y = rows(1).expand(8, 6), torch.zeros(8, dtype=torch.int64)
    for vectorised in (True, False):
        _, _, last, _ = ExampleGradients(task(model, cross_entropy), model, vectorised)(x, y)
        assert len({tuple(row) for row in (last[:, 0] == 0).tolist()}) == 8  # two are alike with a chance of 2^-59


def test_weights_that_are_no_number_are_declined_and_nothing_is_told_of_the_data() -> None:
    model = nn.Linear(6, 1)
    data = TensorDataset(rows(5), torch.randn(5, 1))
    with pytest.raises(Declined) as declined:
        fit_privately(task(model), model, data, Training(learning_rate=3e38), NOISE, 1000.0, 0)
    assert str(declined.value) == "the trained weights are not finite: lower the learning rate (3e+38)"


@pytest.mark.parametrize(
    ("noise", "clip"),
    [(0, 1), (-1, 1), (1, 0), (1, -1), (math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf), (1e-9, 1), (5e-324, 1)],
)
def test_noise_and_clip_are_positive_and_the_sum_is_exact(noise: float, clip: float) -> None:
    model = nn.Linear(6, 1)
    with pytest.raises(ValueError, match=r"must be positive|too little"):
        fit_privately(task(model), model, TensorDataset(rows(5), rows(5)), Training(), noise, clip, 0)


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("optimizer", [None, lambda parameters, learning_rate: torch.optim.Adam(parameters, learning_rate / 30)])
def test_it_learns(generic: bool, optimizer: Any) -> None:
    """Two clouds: from the accuracy of a coin to nearly all."""
    y = torch.arange(400) % 2
    x = torch.randn(400, 6) + 3.0 * (2 * y[:, None] - 1)
    data: Any = list(zip(x, y, strict=True)) if generic else TensorDataset(x, y)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    start = cross_entropy(model(x), y).item()
    training = Training(epochs=4, batch_size=40, learning_rate=1.0)
    fit_privately(task(model, cross_entropy, optimizer), model, data, training, 0.5, 1.0, 0)
    assert (model(x).argmax(dim=1) == y).float().mean() > 0.95
    assert cross_entropy(model(x), y).item() < start / 2


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of the other library's, where everyone is drawn
@pytest.mark.parametrize("noise", [0.8, 2.0])
@pytest.mark.parametrize(("examples", "batch_size", "epochs"), [(1000, 50, 10), (1437, 16, 2), (64, 64, 5)])
def test_other_accountants_say_the_same_of_the_steps(noise: float, examples: int, batch_size: int, epochs: int) -> None:
    steps = steps_of(examples, Training(epochs=epochs, batch_size=batch_size))
    releases = {Release(noise, Sampling.POISSON, batch_size, examples): steps.count}
    renyi, tight = RDPAccountant(), PRVAccountant()
    renyi.history = tight.history = [(noise, steps.rate, steps.count)]
    ours = epsilon(releases, DELTA, Accountant.RDP)
    assert ours == pytest.approx(renyi.get_epsilon(DELTA), abs=0.02)
    theirs = tight.get_epsilon(DELTA, eps_error=0.01)
    assert theirs < ours
    assert theirs == pytest.approx(epsilon(releases, DELTA, Accountant.PLD), abs=0.02)

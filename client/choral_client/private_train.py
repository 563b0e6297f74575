"""The local loop with differential privacy for each example: DP-SGD (Abadi et al. 2016, CCS, algorithm 1).

Each step draws every example by itself, shortens each one's gradient to the clip, puts noise on their sum and divides by how many
were expected: so one example, whatever it holds, moves the sum by the clip and nothing else. How many examples there are is no
secret.

An example is held apart from the others by giving it to the task's code as a batch of its own, on copies of the parameters and
buffers. What a model keeps elsewhere cannot be seen here. And the last bits of a gradient may depend on which others are computed
at once with it, which nobody accounts for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import structlog
import torch
from choral.errors import Declined
from choral.evaluation import batches
from choral.plan import Training
from choral.privacy.noise import STEPS, Bits, gaussian
from choral.task import Task, user_code
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import Dataset, TensorDataset

from choral_client.train import Stopped

log = structlog.get_logger()
_SHORTER = 1 - 2.0**-20  # by what a norm computed in float64 may be too small
_EXACT = 1 << 53  # float64 has all integers up to here
_MICROBATCH_BYTES = 64 << 20  # of gradients
_BLOCK = 1 << 18  # elements of gradients that are clipped at once, so that the temporaries stay in the cache


@dataclass(frozen=True, slots=True)
class Steps:
    """What was done, for an accountant."""

    rate: float
    """with what probability each example was in a step"""
    count: int
    """steps"""


def steps_of(examples: int, training: Training) -> Steps:
    """What `training` does on so many examples, one at least: known before the work."""
    return Steps(min(1.0, training.batch_size / examples), training.epochs * math.ceil(examples / training.batch_size))


def check_model(model: nn.Module) -> None:
    """Raises Declined: a layer mixes examples or keeps statistics of them, or there is nothing to train."""
    for path, module in model.named_modules():
        tracking = isinstance(module, _InstanceNorm) and module.track_running_stats
        if isinstance(module, _BatchNorm) or tracking:
            where = f"layer {path}" if path else "the model"
            what = "keeps statistics of the examples" if tracking else "mixes examples"
            raise Declined(
                f"{where} is a {type(module).__name__}, which {what}: "
                "use nn.GroupNorm or nn.LayerNorm, or choral's Standardize for inputs"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Declined("the model has no trainable parameters: let at least one have requires_grad")


def fit_privately(
    task: Task,
    model: nn.Module,
    examples: Dataset[Any],
    training: Training,
    noise: float,
    clip: float,
    seed: int,
    stop: threading.Event | None = None,
) -> Steps:
    """Train `model` in place; no more is told of the examples than its weights, which have noise on them.

    Gradients have a norm of `clip` at the most; `noise` is the standard deviation on their sum in clips. Buffers stay as they are.
    Raises ValueError: noise or clip is not positive, or the noise is too little for the sum; Declined: as `check_model`, or the
    trained weights are no finite numbers; TaskError: the task's code raised; Stopped: `stop` was set.
    """
    assert isinstance(examples, Sized), "the shard has seen to it"
    _check(noise, clip, len(examples))
    check_model(model)
    steps, expected = steps_of(len(examples), training), min(training.batch_size, len(examples))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, together = ExampleGradients(task, model), _microbatch(trained, training.batch_size)
    bits, source = Bits(), gaussian()
    with torch.random.fork_rng(devices=[]), user_code(f"task {task.name}: training"):
        optimizer = task.optimizer(model.parameters(), training.learning_rate)
        model.train()
        for _ in range(steps.count):
            # One example more shifts what a dropout draws for those after it, which moves the sum further than the clip, unless
            # nobody can know what was drawn. Others know `seed`: it is not enough.
            torch.default_generator.manual_seed(seed ^ int(bits.words(1)[0]))
            total = torch.from_numpy(source(sum(parameter.numel() for parameter in trained)))
            for x, y in _batches_of(examples, _drawn(bits, len(examples), training.batch_size), together):
                if stop is not None and stop.is_set():
                    raise Stopped
                total += clipped_sum(gradients(x, y), clip, STEPS / noise)
            optimizer.zero_grad()
            _put(trained, total.double() * (noise / STEPS * clip / expected))
            optimizer.step()
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise Declined(f"the trained weights are not finite: lower the learning rate ({training.learning_rate:g})")
    return steps


def clipped_sum(gradients: Sequence[Tensor], clip: float, steps: float) -> Tensor:
    """The sum over examples of their gradients, each no longer than `clip`; one with a number that is not finite counts as zero.

    `gradients` are one tensor `(examples, *shape)` a parameter. Returns int64 `(elements,)`, in steps of which a clip has `steps`:
    rounded toward zero, which makes no gradient longer.
    """
    parts = [gradient.reshape(len(gradient), -1) for gradient in gradients]
    size = sum(part.shape[1] for part in parts)
    total, block = torch.zeros(size, dtype=torch.int64), max(1, _BLOCK // size)
    for start in range(0, len(parts[0]), block):
        rows = torch.cat([part[start : start + block].double() for part in parts], dim=1).div_(clip)
        norms = torch.linalg.vector_norm(rows, dim=1)
        lost = ~norms.isfinite()
        rows[lost], norms[lost] = 0.0, 0.0
        rows *= steps * (_SHORTER / norms).clamp_(max=1.0)[:, None]
        total += rows.trunc_().sum(dim=0).to(torch.int64)
    return total


class ExampleGradients:
    """The gradient of each example's loss, as if it were a batch of its own, by all parameters that are trained.

    `vectorised`: many examples at once, as long as the task's code lets torch do so; otherwise one after the other.
    """

    def __init__(self, task: Task, model: nn.Module, vectorised: bool = True) -> None:
        self._task = task
        self._model = model
        self._vectorised = vectorised
        self._at_once = vmap(grad(self._loss), in_dims=(None, None, 0, 0), randomness="different")

    def __call__(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of the examples in `x` and `y`, `(examples, …)`: one tensor `(examples, *shape)` a parameter, in the model's order."""
        if self._vectorised:
            try:
                return list(self._at_once(*self._copies(), x, y).values())
            except Exception as error:  # noqa: BLE001 - torch has no class for what it cannot vectorise; other errors come again below
                log.info("each example's gradient is computed by itself", reason=f"{type(error).__name__}: {error}")
                self._vectorised = False
        one_by_one = [self._of_one_or_none(*example) for example in zip(x, y, strict=True)]
        return [torch.stack(of_all) for of_all in zip(*one_by_one, strict=True)]

    def _of_one_or_none(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Zero where the task's code raises: that the work ends would tell of this example."""
        try:
            return self._of_one(x, y)
        except Exception as error:  # noqa: BLE001 - whatever it is
            log.warning("an example counts as nothing", reason=f"{type(error).__name__}: {error}")
            return [torch.zeros_like(parameter) for parameter in self._model.parameters() if parameter.requires_grad]

    def _of_one(self, x: Tensor, y: Tensor) -> list[Tensor]:
        trained, fixed = self._copies()
        for parameter in trained.values():
            parameter.requires_grad_()
        loss = self._loss(trained, fixed, x, y)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        return [gradient.to_dense() for gradient in found]

    def _loss(self, trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self._task.loss(functional_call(self._model, {**trained, **fixed}, (x[None],)), y[None])

    def _copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the parameters that are trained, and of all else: what a forward pass writes on them is not kept."""
        parameters, buffers = dict(self._model.named_parameters()), dict(self._model.named_buffers())
        trained = {name: value.detach().clone() for name, value in parameters.items() if value.requires_grad}
        return trained, {name: value.detach().clone() for name, value in (parameters | buffers).items() if name not in trained}


def _check(noise: float, clip: float, examples: int) -> None:
    if not (0 < noise < math.inf and 0 < clip < math.inf):
        raise ValueError(f"noise and clip must be positive: {noise:g}, {clip:g}")
    if examples * STEPS / noise > _EXACT:
        raise ValueError(f"noise {noise:g} is too little for a sum of {examples} examples to be exact")


def _microbatch(trained: Sequence[Tensor], batch_size: int) -> int:
    """How many examples are computed at once: hardly ever fewer than are drawn, if the memory allows it."""
    each = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return max(1, min(2 * batch_size, _MICROBATCH_BYTES // each))


def _drawn(bits: Bits, examples: int, batch_size: int) -> Tensor:
    """Indices of examples, each drawn by itself with probability min(1, batch_size / examples), exactly."""
    return torch.from_numpy(np.flatnonzero(bits.below(examples, examples) < batch_size))


def _batches_of(examples: Dataset[Any], index: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (x, y) of at most `size` of the examples that `index` lists."""
    if isinstance(examples, TensorDataset):
        return batches(TensorDataset(*(tensor[index] for tensor in examples.tensors)), size)
    loaded = [example for number in index.tolist() for example in _loaded(examples, number)]
    return batches(cast("Dataset[Any]", loaded), size)


def _loaded(examples: Dataset[Any], number: int) -> Iterator[Any]:
    """One example; none if the task's code raises, for that the work ends would tell of it."""
    try:
        yield examples[number]
    except Exception as error:  # noqa: BLE001 - whatever it is
        log.warning("an example counts as nothing", reason=f"{type(error).__name__}: {error}")


def _put(trained: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """Give each parameter its part of `gradient` `(elements,)`."""
    for parameter, part in zip(trained, torch.split(gradient, [parameter.numel() for parameter in trained]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)

"""What an assignment asks for, done: from a plan and a checkpoint to a result."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch
from choral.errors import Declined
from choral.evaluation import evaluate
from choral.flat import describe, flatten
from choral.metrics import LOSS, Metric
from choral.plan import Kind, Plan
from choral.statistics import Moments
from choral.task import Task, user_code
from safetensors import SafetensorError
from safetensors.torch import load

from choral_client.data import Shard
from choral_client.train import fit

_TOLD = 300  # characters of what torch says


@dataclass(frozen=True)
class Result:
    """What is sent back: the payload's bytes, and what was measured before and during the work."""

    payload: memoryview
    held_out: tuple[Metric, ...] = ()
    work: tuple[Metric, ...] = ()


class Work:
    """Does assignments for one task on one shard. The model is built once and takes the weights of each checkpoint."""

    def __init__(self, task: Task, shard: Shard) -> None:
        self._task = task
        self._shard = shard
        self._model = task.initial_model(0)
        self.manifest = describe(self._model)

    def do(self, plan: Plan, checkpoint: bytes, stop: threading.Event) -> Result:
        """Do what `plan` says, starting from a safetensors file. Raises Declined, TaskError, or Stopped once `stop` is set."""
        if (plan.task, plan.task_version) != (self._task.name, self._task.version):
            raise Declined(
                f"asked for task {plan.task} {plan.task_version}; {self._task.name} {self._task.version} is installed here"
            )
        self._take(checkpoint)
        if plan.kind is Kind.STATISTICS:
            return self._statistics()
        held_out = self._measure() if plan.evaluate else ()
        if plan.kind is Kind.EVALUATION:
            if not held_out:
                raise Declined("no examples are held out here (holdout in the client's configuration)")
            return Result(memoryview(b""), held_out)
        return self._train(plan, held_out, stop)

    def _take(self, checkpoint: bytes) -> None:
        try:
            self._model.load_state_dict(load(checkpoint))
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Declined(f"the version that the coordinator sent is not of this task's model: {_first_line(error)}") from error

    def _statistics(self) -> Result:
        with user_code(f"task {self._task.name}: reading the features"):
            moments = Moments.of(self._shard.features().numpy())
        return Result(moments.to_vector().astype("<f8").data.cast("B"))

    def _measure(self) -> tuple[Metric, ...]:
        """What can be measured on the examples held out; a metric that is not a number there is not told."""
        if self._shard.held_out is None:
            return ()
        return tuple(m for m in evaluate(self._task, self._model, self._shard.held_out) if math.isfinite(m.value))

    def _train(self, plan: Plan, held_out: tuple[Metric, ...], stop: threading.Event) -> Result:
        before = flatten(self._model.state_dict(), self.manifest)
        began = time.monotonic()
        loss = fit(self._task, self._model, self._shard.training, plan.training, plan.seed, stop)
        seconds = time.monotonic() - began
        delta = flatten(self._model.state_dict(), self.manifest)
        np.subtract(delta, before, out=delta)
        work = [Metric("train_s", seconds, self._shard.size)]
        if loss is not None:
            work.append(Metric(f"train_{LOSS}", loss, self._shard.size))
        return Result(delta.astype("<f4", copy=False).data.cast("B"), held_out, tuple(work))


def _first_line(error: Exception) -> str:
    """Of torch's, which names every tensor, the beginning."""
    return " ".join(str(error).split())[:_TOLD]


def set_threads(threads: int | None) -> None:
    """Train with so many CPU threads in all; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)

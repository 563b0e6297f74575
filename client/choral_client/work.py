"""What an assignment asks for, done: from a plan and a checkpoint to a result."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch
from choral import codecs
from choral.codecs import FLOAT32, Codec, Vector
from choral.errors import Declined
from choral.evaluation import evaluate
from choral.flat import describe, flatten
from choral.metrics import LOSS, Metric
from choral.plan import Kind, Plan
from choral.statistics import Moments
from choral.task import Task, user_code

from choral_client.checkpoint import Expected
from choral_client.data import Shard
from choral_client.residual import Feedback
from choral_client.train import fit


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
        self.expected = Expected(self.manifest)

    def do(
        self, plan: Plan, checkpoint: bytes, stop: threading.Event, codec: Codec = FLOAT32, feedback: Feedback | None = None
    ) -> Result:
        """Do what `plan` says, starting from a safetensors file. An update is encoded by `codec`, `feedback` added before.

        Raises Declined, TaskError, or Stopped once `stop` is set.
        """
        self.check(plan)
        self._model.load_state_dict(self.expected.read(checkpoint))
        if plan.kind is Kind.STATISTICS:
            return self._statistics()
        held_out = self._measure() if plan.evaluate else ()
        if plan.kind is Kind.EVALUATION:
            if not held_out:
                raise Declined("no examples are held out here (holdout in the client's configuration)")
            return Result(memoryview(b""), held_out)
        return self._train(plan, held_out, stop, codec, feedback)

    def check(self, plan: Plan) -> None:
        """Raises Declined: the plan is for a task that is not installed here."""
        if (plan.task, plan.task_version) != (self._task.name, self._task.version):
            raise Declined(
                f"asked for task {plan.task} {plan.task_version}; {self._task.name} {self._task.version} is installed here"
            )

    def _statistics(self) -> Result:
        with user_code(f"task {self._task.name}: reading the features"):
            moments = Moments.of(self._shard.features().numpy())
        return Result(moments.to_vector().astype("<f8").data.cast("B"))

    def _measure(self) -> tuple[Metric, ...]:
        """What can be measured on the examples held out; a metric that is not a number there is not told."""
        if self._shard.held_out is None:
            return ()
        return tuple(m for m in evaluate(self._task, self._model, self._shard.held_out) if math.isfinite(m.value))

    def _train(
        self, plan: Plan, held_out: tuple[Metric, ...], stop: threading.Event, codec: Codec, feedback: Feedback | None
    ) -> Result:
        before = flatten(self._model.state_dict(), self.manifest)
        began = time.monotonic()
        loss = fit(self._task, self._model, self._shard.training, plan.training, plan.seed, stop)
        seconds = time.monotonic() - began
        delta = flatten(self._model.state_dict(), self.manifest)
        np.subtract(delta, before, out=delta)
        work = [Metric("train_s", seconds, self._shard.size)]
        if loss is not None:
            work.append(Metric(f"train_{LOSS}", loss, self._shard.size))
        return Result(_payload(delta, codec, plan.seed, feedback), held_out, tuple(work))


def _payload(delta: Vector, codec: Codec, seed: int, feedback: Feedback | None) -> memoryview:
    if codec is FLOAT32:  # as it lies in memory
        return delta.astype("<f4", copy=False).data.cast("B")
    rng, values = codecs.rng_of(seed), codecs.blocks(delta)
    if feedback is None:
        return memoryview(b"".join(codecs.encoded(values, codec, rng)))
    return memoryview(b"".join(codecs.encoded_with_feedback(values, codec, rng, feedback.blocks(), feedback.keep)))


def set_threads(threads: int | None) -> None:
    """Train with so many CPU threads in all; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)

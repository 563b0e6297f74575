"""What an assignment asks for, done: from a plan and a checkpoint to a result."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase

import numpy as np
import structlog
import torch
from choral import codecs
from choral.codecs import FLOAT32, Codec, Vector
from choral.errors import Declined, TaskError
from choral.evaluation import evaluate
from choral.flat import describe
from choral.metrics import LOSS, Metric
from choral.plan import Kind, Plan
from choral.privacy.told import scaled_metrics, scaled_moments, unclipped
from choral.secagg.summand import LARGEST, Layout, Summand, layout_of
from choral.statistics import Moments
from choral.task import Task, user_code
from numpy.typing import NDArray

from choral_client import contribution, noised_part
from choral_client.checkpoint import Expected, Place
from choral_client.data import Shard
from choral_client.noised_part import Blocks, NoisedPart, part_of
from choral_client.residual import Feedback
from choral_client.train import fit
from choral_client.update import moved

log = structlog.get_logger()


@dataclass(frozen=True)
class Result:
    """What is sent back: the payload, piece by piece and once, and what was measured before and during the work.

    The pieces of an update are made from the model as they are taken: before the next work begins.
    """

    payload: Iterable[bytes]
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
        self._places: dict[str, Place] = {}

    @property
    def examples(self) -> int:
        """How many it trains on."""
        return self._shard.size

    def do(
        self,
        plan: Plan,
        checkpoint: BufferedIOBase,
        stop: threading.Event,
        codec: Codec = FLOAT32,
        feedback: Feedback | None = None,
    ) -> Result:
        """Do what `plan` says, starting from a safetensors file. An update is encoded by `codec`, `feedback` added before.

        Raises Declined, TaskError, or Stopped once `stop` is set.
        """
        self.check(plan)
        self._load(checkpoint)
        if plan.private is not None:
            return self._noised(plan, checkpoint, stop, codec, feedback)
        if plan.kind is Kind.STATISTICS:
            return Result((self._moments(plan).to_vector().astype("<f8").tobytes(),))
        held_out = self._measure() if plan.evaluate else ()
        if plan.kind is Kind.EVALUATION:
            return Result((), held_out if plan.noised else _some(held_out))
        hides = plan.noised or plan.examples is not None
        if hides:
            self._train_or_not(plan, checkpoint, stop)
        work = () if hides else self._train(plan, stop)
        return Result(_encoded(self._moved(checkpoint), codec, plan.seed, feedback), held_out, work)

    def contribute(self, plan: Plan, checkpoint: BufferedIOBase, stop: threading.Event) -> Summand:
        """The same as a term of a secure sum. Raises Declined, TaskError, or Stopped once `stop` is set.

        Work that comes to no number, or no examples to measure with, are no reason to decline: to say so would tell of this client
        alone, and who chooses the model could ask for it. They add nothing to the sum.
        """
        self.check(plan)
        assert plan.secure is not None, "what is not summed securely is sent as a result"
        layout = self.layout(plan)
        self._load(checkpoint)
        if plan.private is not None:
            part, numbers, blocks = self._part(plan), self._numbers(plan), self._trained(plan, checkpoint, stop)
            return noised_part.summand(part, layout, blocks, numbers)
        if plan.kind is Kind.STATISTICS:
            if plan.examples is not None:
                return contribution.of_moments(layout, self._moments(plan))
            return contribution.of_features(layout, self._features())
        held_out = self._measure() if plan.evaluate else ()
        if plan.kind is Kind.EVALUATION:
            return contribution.of_measurements(layout, plan.secure, held_out)
        try:
            self._train(plan, stop)
            return contribution.of_update(lambda: self._moved(checkpoint), layout, plan.secure, self._shard.size, held_out)
        except Declined as error:
            log.warning("nothing is added to the sum", reason=str(error))
            return contribution.of_nothing(layout, plan.secure, held_out)

    def _noised(
        self, plan: Plan, checkpoint: BufferedIOBase, stop: threading.Event, codec: Codec, feedback: Feedback | None
    ) -> Result:
        """What is sent with noise that this client adds to it."""
        part, numbers = self._part(plan), self._numbers(plan)
        beside = part.beside_as_told(numbers) if numbers.size else numbers
        if plan.kind is Kind.STATISTICS:
            return Result((np.concatenate([[1.0], beside]).astype("<f8").tobytes(),))
        assert plan.private is not None, "or nobody would ask for it"
        told = zip(self._metrics, beside.tolist(), plan.private.ranges, strict=True) if numbers.size else ()
        held_out = tuple(Metric(name, unclipped(value, within), 1) for name, value, within in told)
        blocks = self._trained(plan, checkpoint, stop)
        if blocks is None:
            return Result((), held_out)
        return Result(_encoded(part.update_as_told(blocks), codec, plan.seed, feedback), held_out)

    def _part(self, plan: Plan) -> NoisedPart:
        names = self._features().shape[1] if plan.kind is Kind.STATISTICS else len(self._metrics)
        return part_of(plan, self.manifest.size, names)

    def _numbers(self, plan: Plan) -> NDArray[np.float64]:
        """What is told beside the update, from -1 to 1."""
        assert plan.private is not None, "only then"
        ranges = plan.private.ranges
        if plan.kind is not Kind.STATISTICS and not plan.evaluate:
            return noised_part.NOTHING
        try:
            if plan.kind is Kind.STATISTICS:
                return scaled_moments(Moments.of(self._features()), ranges)
            return scaled_metrics({m.name: m.value for m in self._measure()}, self._metrics, ranges)
        except TaskError as error:  # to say so would tell of this client alone, without any noise
            log.warning("the middle of each range is told", reason=str(error))
            return np.zeros(2 * len(ranges) if plan.kind is Kind.STATISTICS else len(ranges))

    def _trained(self, plan: Plan, checkpoint: BufferedIOBase, stop: threading.Event) -> Blocks | None:
        """The update of a training round, after the training."""
        if plan.kind is not Kind.TRAINING:
            return None
        self._train_or_not(plan, checkpoint, stop)
        return lambda: self._moved(checkpoint)

    @property
    def _metrics(self) -> tuple[str, ...]:
        return (LOSS, *self._task.metrics)

    def _moments(self, plan: Plan) -> Moments:
        """Of the features, in which no single example can be found, if that is asked for."""
        features = self._features()
        if plan.examples is None:
            return Moments.of(features)
        return noised_part.hidden_moments(features, plan.examples.ranges, plan.examples.noise)

    def layout(self, plan: Plan) -> Layout:
        """How a term of a secure sum is laid out."""
        features = self._features().shape[1] if plan.kind is Kind.STATISTICS else None
        return layout_of(plan, self.manifest.size, features, self._metrics)

    def check(self, plan: Plan) -> None:
        """Raises Declined: the plan is for a task that is not installed here, or its model cannot be trained as asked."""
        if (plan.task, plan.task_version) != (self._task.name, self._task.version):
            raise Declined(
                f"asked for task {plan.task} {plan.task_version}; {self._task.name} {self._task.version} is installed here"
            )
        if plan.examples is None:
            return
        if plan.private is not None or plan.evaluate or plan.kind is Kind.EVALUATION:
            raise Declined("asked to hide single examples, and beside it for what is computed from them without that noise")
        if plan.kind is Kind.TRAINING:
            from choral_client.private_train import check_model

            check_model(self._model)

    def _features(self) -> NDArray[np.floating]:
        with user_code(f"task {self._task.name}: reading the features"):
            features: NDArray[np.floating] = self._shard.features().numpy()
            return features

    def _moved(self, checkpoint: BufferedIOBase) -> Iterator[Vector]:
        """The update, block by block."""
        return moved(self._model.state_dict(), self.manifest, self._places, checkpoint)

    def _measure(self) -> tuple[Metric, ...]:
        """What can be measured on the examples held out; a metric that is no number there, or too large, is not told."""
        if self._shard.held_out is None:
            return ()
        return tuple(m for m in evaluate(self._task, self._model, self._shard.held_out) if abs(m.value) <= LARGEST)

    def _load(self, checkpoint: BufferedIOBase) -> None:
        """Read the weights to where the model has them; if it has them elsewhere, it is given a copy."""
        self._places = self.expected.places(checkpoint)
        state = self._model.state_dict()
        inside = {tensor.data_ptr() for tensor in (*self._model.parameters(), *self._model.buffers())}
        direct = all(t.data_ptr() in inside and t.is_contiguous() and t.is_cpu for t in state.values())
        if not direct:
            state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
        for name, place in self._places.items():
            place.read_into(checkpoint, state[name].detach())
        self._model.load_state_dict(state)  # if they are there already, for what modules do when they are given weights

    def _train(self, plan: Plan, stop: threading.Event) -> tuple[Metric, ...]:
        """Train the model; what was measured on the way."""
        if (hiding := plan.examples) is not None:
            from choral_client.private_train import fit_privately  # torch.func takes a while, and few need it

            fit_privately(self._task, self._model, self._shard.training, plan.training, hiding.noise, hiding.clip, plan.seed, stop)
            return ()
        began = time.monotonic()
        loss = fit(self._task, self._model, self._shard.training, plan.training, plan.seed, stop)
        seconds = time.monotonic() - began
        work = [Metric("train_s", seconds, self._shard.size)]
        if loss is not None:
            work.append(Metric(f"train_{LOSS}", loss, self._shard.size))
        return tuple(work)

    def _train_or_not(self, plan: Plan, checkpoint: BufferedIOBase, stop: threading.Event) -> None:
        """Train the model; if that comes to no number, it stays as it was, and its update is nothing.

        How it went is told to nobody: a loss is a number of this client alone, and there is no noise on it.
        """
        try:
            self._train(plan, stop)
            if all(bool(torch.isfinite(tensor).all()) for tensor in self._model.state_dict().values()):
                return
            log.warning("no change is sent", reason="the trained model holds an infinite or undefined number")
        except (Declined, TaskError) as error:
            if isinstance(error, TaskError) and plan.private is None and plan.examples is None:
                raise
            log.warning("no change is sent", reason=str(error))
        self._load(checkpoint)


def _some(held_out: tuple[Metric, ...]) -> tuple[Metric, ...]:
    if not held_out:
        raise Declined("no examples are held out here (holdout in the client's configuration)")
    return held_out


def _encoded(blocks: Iterator[Vector], codec: Codec, seed: int, feedback: Feedback | None) -> Iterator[bytes]:
    rng = codecs.rng_of(seed)
    if feedback is None:
        return codecs.encoded(blocks, codec, rng)
    return codecs.encoded_with_feedback(blocks, codec, rng, feedback.blocks(), feedback.keep)


def set_threads(threads: int | None) -> None:
    """Train with so many CPU threads in all; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)

"""Task: what a user writes to federate a model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from choral.descent import Descent, Optimizer
from choral.errors import ChoralError, TaskError
from choral.plan import Training

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.data import Dataset


@dataclass(frozen=True)
class Task:
    """A model, its loss, its metrics and its data loading.

    `load` turns the path of a shard into a dataset of pairs (x, y): a `choral.Table`, or any function that returns a map-style
    `torch.utils.data.Dataset` (a TensorDataset trains fastest). `loss(prediction, y)` is the mean over the batch. Each metric
    is a function (prediction, y) -> number over all examples measured. `training` holds the defaults that a coordinator's
    configuration may override. `optimizer(parameters, learning_rate)` is made anew in each round; it is any of torch.optim, or
    whatever has its `zero_grad()` and `step()`. `ranges` are the smallest and largest value that each feature can have, known
    without looking at any example; differential privacy needs them if the model has a Standardize layer.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    load: Callable[[Path], Dataset[Any]]
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor | float]] = field(default_factory=dict)
    training: Training = Training()
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer] = Descent
    version: str = "1"
    ranges: Sequence[tuple[float, float]] | None = None

    def initial_model(self, seed: int) -> nn.Module:
        """The model with its initial weights, a function of `seed`. Raises TaskError: the task's code raised."""
        with user_code(f"task {self.name}: model()"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def examples(self, path: Path) -> Dataset[Any]:
        """The dataset in a shard. Raises DataError (from a Table) or TaskError: the task's code raised."""
        with user_code(f"task {self.name}: load({str(path)!r})"):
            return self.load(path)


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn whatever a task's own code raises into a TaskError that says `what` was being done."""
    try:
        yield
    except ChoralError:
        raise
    except Exception as error:
        raise TaskError(f"{what} raised {type(error).__name__}: {error}") from error


def load_task(reference: str) -> Task:
    """Import the Task that "module:attribute" names; modules in the working directory are found too.

    Raises TaskError: the reference is malformed, the module cannot be imported, or the attribute is no Task.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise TaskError(f"task {reference!r}: write it as module:attribute, for example choral.tasks.boston_housing:task")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        with user_code(f"task {reference!r}: importing {module_name}"):
            module = importlib.import_module(module_name)
    except TaskError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == module_name.partition(".")[0]:
            raise TaskError(f"task {reference!r}: no module {module_name} in {here} or among the installed packages") from error
        raise
    if not hasattr(module, attribute):
        known = ", ".join(name for name, value in vars(module).items() if isinstance(value, Task)) or "none"
        raise TaskError(f"task {reference!r}: {module_name} has no attribute {attribute}; tasks in it: {known}")
    task = getattr(module, attribute)
    if not isinstance(task, Task):
        raise TaskError(f"task {reference!r}: is a {type(task).__name__}; a choral.Task is expected")
    return task

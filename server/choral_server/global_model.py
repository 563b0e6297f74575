"""The model that the federation trains, as the coordinator holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from choral.errors import ConfigError
from choral.evaluation import evaluate
from choral.flat import describe, flatten, unflatten
from choral.metrics import Metric
from choral.standardize import standardize_of
from choral.statistics import Moments
from choral.task import Task
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import Dataset


class GlobalModel:
    """One task's model with its present weights."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task = task
        self._model: nn.Module = task.initial_model(seed)
        self._standardize = standardize_of(self._model)
        self.manifest = describe(self._model)

    @property
    def features(self) -> int | None:
        """How many features a statistics round measures; None: the model wants none."""
        return self._standardize.mean.numel() if self._standardize is not None else None

    @property
    def standardizes(self) -> bool:
        """Whether the statistics of a round are in it."""
        layer = self._standardize
        return layer is not None and bool(layer.mean.any() or (layer.scale != 1).any())

    @property
    def weights(self) -> NDArray[np.float32]:
        """The flat vector `(manifest.size,)`."""
        return flatten(self._model.state_dict(), self.manifest)

    def set_weights(self, weights: NDArray[np.float32]) -> None:
        """Take the flat vector `(manifest.size,)`."""
        self._model.load_state_dict(unflatten(weights, self._model.state_dict(), self.manifest))

    def set_statistics(self, moments: Moments) -> None:
        """Take means and deviations of the raw features into the model's buffers."""
        if self._standardize is not None:
            self._standardize.fill(moments)

    def evaluate(self, examples: Dataset[Any]) -> tuple[Metric, ...]:
        """Loss and metrics on a dataset that the coordinator holds."""
        return evaluate(self.task, self._model, examples)

    def to_bytes(self, metadata: dict[str, str]) -> bytes:
        """The state dict as a safetensors file. One key of metadata at most: safetensors writes several in random order."""
        return save({name: tensor.clone().contiguous() for name, tensor in self._model.state_dict().items()}, metadata)

    def load(self, path: Path) -> None:
        """Take the state from a safetensors file. Raises ConfigError: it is damaged, or belongs to another model."""
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be loaded ({error}): restore it, or give the run another name") from error
        present = _difference(self._model, state)
        if present is not None:
            raise ConfigError(f"{path}: is not of task {self.task.name} {self.task.version}: {present}; give the run another name")
        self._model.load_state_dict(state)


def _difference(model: nn.Module, state: dict[str, torch.Tensor]) -> str | None:
    """How a stored state differs from the model, or None."""
    ours = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    theirs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return f"tensor {name} is {theirs.get(name, 'missing')} where {ours.get(name, 'nothing')} is expected"
    return None

"""A layer that standardises raw features with statistics that the federation measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from choral.errors import TaskError
from choral.statistics import Moments


class Standardize(nn.Module):
    """(x − mean) / scale, per feature.

    Both are buffers `(features,)`, float32, that the coordinator fills from the statistics round, so that a checkpoint
    predicts from raw features. Features listed in `keep` pass unchanged (a 0/1 column, say).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, keep: Sequence[int] = ()) -> None:
        super().__init__()
        if features < 1 or not all(0 <= index < features for index in keep):
            raise TaskError(f"Standardize(features={features}, keep={list(keep)}): keep holds indices from 0 to features - 1")
        self.keep = tuple(keep)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise `x`, shape `(..., features)`."""
        return (x - self.mean) / self.scale

    def fill(self, moments: Moments) -> None:
        """Take mean and deviation from `moments`. Raises TaskError: another number of features."""
        if moments.mean.size != self.mean.numel():
            raise TaskError(f"statistics of {moments.mean.size} features for a layer of {self.mean.numel()}")
        kept = list(self.keep)
        self.mean.copy_(torch.from_numpy(moments.mean))
        self.scale.copy_(torch.from_numpy(moments.deviation))
        self.mean[kept] = 0.0
        self.scale[kept] = 1.0


def standardize_of(model: nn.Module) -> Standardize | None:
    """The model's Standardize layer, or None. Raises TaskError: there is more than one."""
    found = [module for module in model.modules() if isinstance(module, Standardize)]
    if len(found) > 1:
        raise TaskError(f"the model has {len(found)} Standardize layers; one, over the raw features, is supported")
    return found[0] if found else None

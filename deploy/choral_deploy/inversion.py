"""Gradient inversion: an example's features, read from the update of whoever has trained on it.

Of a first layer a = W x + b the gradients of one example are ∂W = δ xᵀ and ∂b = δ, with one δ for each unit (Phong et al. 2018,
IEEE TIFS 13(5), §III; Geiping et al. 2020, NeurIPS, proposition 3.1). A step of plain gradient descent multiplies both by −η, which
cancels, and so do more steps on the same example: x = ΔW_i / Δb_i for each unit i that has moved. Of more examples it is a mixture,
and of an optimizer that scales each weight's gradient by itself (Adam) it is something else.

Pure, and with the eyes of a coordinator: a payload, the version that it started from, the manifest. Nothing else comes in here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import numpy as np
from choral import codecs
from choral.codecs import FLOAT32
from choral.errors import ChoralError, InvalidMessage, TaskError
from choral.manifest import Entry, EntryKind, Manifest
from choral.secagg.fixed_point import FixedPoint
from numpy.typing import NDArray
from safetensors.numpy import load

Floats = NDArray[np.floating[Any]]
_ALIKE = 0.01  # how near two units' readings must be to be the same one; two mixtures of inputs hardly ever are


class NothingToInvert(ChoralError):
    """No bias of the first layer has moved: the update says nothing of what was trained on."""


def read_plain(payload: bytes, manifest: Manifest) -> Floats:
    """The update `(manifest.size,)` in a payload that is not masked. Raises InvalidMessage: it has another length."""
    blocks = codecs.decoded(io.BytesIO(payload).read, FLOAT32, manifest.size)
    return np.concatenate([block.astype(np.float64) for block in blocks])


def read_masked(payload: bytes, numbers: FixedPoint, manifest: Manifest) -> Floats:
    """What a result's integers stand for, `(manifest.size,)`, masked or not; what is behind them is no part of the update.

    Raises InvalidMessage: there are fewer.
    """
    if len(payload) < numbers.dtype.itemsize * manifest.size:
        raise InvalidMessage(f"{len(payload)} bytes for {manifest.size} integers of {numbers.ring_bits} bits")
    return numbers.decode(np.frombuffer(payload, numbers.dtype, manifest.size))


@dataclass(frozen=True)
class FirstLayer:
    """Where the first layer lies in an update, and by what its input was standardized: `mean` and `scale` `(d,)`, float64."""

    weight: Entry
    bias: Entry
    mean: Floats = field(repr=False)
    scale: Floats = field(repr=False)

    @classmethod
    def of(cls, version: bytes, manifest: Manifest) -> Self:
        """Of a version as everybody gets it, a safetensors file. Raises TaskError: the model does not begin with a linear layer."""
        for weight, bias in pairwise(manifest.averaged):
            if len(weight.shape) == 2 and bias.shape == weight.shape[:1]:
                mean, scale = _standardization(version, manifest, weight.shape[1])
                return cls(weight, bias, mean, scale)
        raise TaskError("the model has no linear layer with a bias, from whose update an input could be read")

    def invert(self, update: Floats) -> Floats:
        """The features `(d,)` of the example behind an update, in their own units. Raises NothingToInvert.

        What all units say of the input, by least squares: the x for which Σ_i ‖ΔW_i − Δb_i x‖² is smallest. Units that have moved
        far count most: in them the rounding of the weights to float32 is smallest beside the movement.
        """
        weight, bias = self._moved(update)
        return self._features(bias @ weight / (bias @ bias))

    def agreeing(self, update: Floats) -> list[Floats]:
        """The features of each input of which two units say the same, in a sum of several updates. Raises NothingToInvert.

        A unit that is on for one example alone (it has a ReLU) has moved for that one alone, and says its input exactly, whatever
        else is in the sum. Which units these are shows where two say the same: those that mix several inputs all differ.
        """
        weight, bias = self._moved(update)
        on = bias != 0
        said = weight[on] / bias[on, None]
        found: list[Floats] = []
        for number, one in enumerate(said):
            if any(_alike(one, other) for other in said[:number]) and not any(_alike(one, other) for other in found):
                found.append(one)
        return [self._features(one) for one in found]

    def error(self, found: Floats, true: Floats) -> float:
        """How wrong `found` is, both `(d,)` in their own units: ‖ẑ − z‖ / ‖z‖, of what the first layer gets as its input.

        z = (x − mean) / scale: each feature counts by how much it differs between people, whatever its unit, and none is divided
        by itself, which may be zero. 0 is exact. 1 is what somebody gets who has seen nothing and says the mean.
        """
        return float(np.linalg.norm((found - true) / self.scale) / np.linalg.norm((true - self.mean) / self.scale))

    def _moved(self, update: Floats) -> tuple[Floats, Floats]:
        weight, bias = (update[entry.offset : entry.offset + entry.size] for entry in (self.weight, self.bias))
        if not np.any(bias):
            raise NothingToInvert(f"{self.bias.name} has not moved: the update says nothing of what was trained on")
        return weight.reshape(self.weight.shape), bias

    def _features(self, entered: Floats) -> Floats:
        return entered * self.scale + self.mean


def _standardization(version: bytes, manifest: Manifest, features: int) -> tuple[Floats, Floats]:
    """The statistics of the version, or what changes nothing."""
    state = load(version)
    known = {entry.name.rpartition(".")[2]: state[entry.name] for entry in manifest.entries if entry.kind is EntryKind.STATISTIC}
    mean, scale = known.get("mean", np.zeros(features)), known.get("scale", np.ones(features))
    return mean.astype(np.float64), scale.astype(np.float64)


def _alike(one: Floats, other: Floats) -> bool:
    return bool(np.linalg.norm(one - other) < _ALIKE * np.linalg.norm(one))

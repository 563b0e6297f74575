"""Whether and how clients hide each single example in training: that part of the configuration."""

from __future__ import annotations

from typing import Annotated

from choral.config import Settings
from choral.plan import ExamplePlan, Kind
from choral.privacy.told import Range
from pydantic import Field


class ExamplePrivacy(Settings):
    """Clients train by DP-SGD (Abadi et al. 2016, CCS): noise on sums of gradients of single examples, each shortened to `clip`.

    Each client keeps its own budget, for how many examples it has decides what a round costs.
    """

    epsilon: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    """the most that an example may lose over all rounds; a client that would exceed it declines, and says so"""
    delta: Annotated[float, Field(gt=0, le=0.01)]
    """the δ that goes with epsilon; it must be well below one over the number of examples of a client"""
    noise: Annotated[float, Field(ge=0.05, le=10_000, allow_inf_nan=False)]
    """standard deviation of the noise on a sum of gradients, over clip; `choral privacy examples` says how much is needed"""
    clip: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = 1.0
    """Euclidean norm to which the gradient of each example is shortened"""

    def plan(self, kind: Kind, features: tuple[Range, ...] | None) -> ExamplePlan:
        """What clients are told in a round of this kind."""
        ranges = features or () if kind is Kind.STATISTICS else ()
        return ExamplePlan(self.noise, self.clip, self.epsilon, self.delta, ranges)

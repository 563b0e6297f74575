"""Whether and how noise is added to what a round gives, and how much privacy may be lost: that part of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from choral.config import Settings
from choral.plan import Kind
from choral.privacy.accounting import Accountant, Release, Sampling
from choral.privacy.noise import STEPS, Noise, discrete_gaussian, gaussian
from choral.privacy.skellam import as_gaussian
from pydantic import Field, model_validator

from choral_server.records import CENTRAL, DISTRIBUTED, LOCAL

Bound = Annotated[float, Field(allow_inf_nan=False)]
LEAST_CLIP, LARGEST_CLIP = 1e-6, 1e6
_CLIP_SHARE = 0.02  # of a round's privacy, for how many updates were clipped
_LARGEST_ROUNDING = 0.5  # of the clip


class AdaptiveClip(Settings):
    """A clip that follows the updates (Andrew et al. 2021, NeurIPS, algorithm 1)."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """share of the updates that are to be no longer than the clip"""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """how fast it follows: by at most so much, as a power of e, each round"""

    def next(self, clip: float, within: float) -> float:
        """The clip after a round in which the noised share `within` was no longer than `clip`."""
        moved = clip * math.exp(-self.rate * (min(1.0, max(0.0, within)) - self.quantile))
        return min(LARGEST_CLIP, max(LEAST_CLIP, moved))


class Privacy(Settings):
    """Differential privacy for clients: updates are clipped, noise is added, and a budget is kept."""

    mode: Literal["central", "distributed", "local"] = "central"
    """who adds the noise, and so who must be trusted: central, the coordinator, to the sum (McMahan et al. 2018, ICLR);
    distributed, each client a part of it, inside the sum of secure_aggregation, which must be on (Agarwal et al. 2021, NeurIPS);
    local, each client all of it, before anything leaves it, which costs by far the most accuracy"""

    epsilon: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    """the budget: the round that would spend more, over all runs in this database, is not opened, and the run ends"""
    delta: Annotated[float, Field(gt=0, le=0.01)]
    """the δ that goes with epsilon; it must be well below one over the number of clients"""
    noise: Annotated[float, Field(ge=0.05, le=10_000, allow_inf_nan=False)]
    """standard deviation of the noise over what one client can move, of all that a round gives; `choral privacy plan` says how much
    is needed"""
    clip: Annotated[float, Field(ge=LEAST_CLIP, le=LARGEST_CLIP, allow_inf_nan=False)] = 1.0
    """Euclidean norm to which an update is shortened before it counts; the first, if it is adaptive"""
    adaptive: AdaptiveClip | None = None
    """let the clip follow the updates, with a fiftieth of each round's privacy; it stays as it is, if not given"""
    sampling: Literal["poisson", "fixed", "none"] = "none"
    """how a round's cohort is drawn from those who attend: poisson, each with the probability with which cohort_size are expected;
    fixed, exactly cohort_size; both by the operating system's randomness, and counted in epsilon, which holds for whoever does
    not learn who was drawn: nobody is drawn again for one who does not answer, and run.quorum is only how many must attend; none,
    and epsilon holds for everybody"""
    accountant: Literal["rdp", "pld"] = "rdp"
    """how epsilon is counted: rdp, a tenth of a second for each round with poisson; pld, lower, and a second or more"""
    honest: Annotated[float, Field(gt=0, le=1)] = 1.0
    """in mode distributed, the share of the clients in a sum whose noise is counted on; what others add is not"""
    discrete: bool = False
    """add exactly discrete Gaussian noise, without any floating point, which takes eight times as long"""
    metrics: dict[str, Annotated[tuple[Bound, Bound], Field(strict=False)]] | None = None
    """what clients measure, with the smallest and largest value of each: what is beyond counts as that; the means get noise, for
    `metrics_share` of each round's privacy; needed if evaluation.clients is on"""
    metrics_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """share of a training round's privacy that goes to metrics"""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.accountant == "pld" and self.sampling == "fixed":
            raise ValueError("accountant: pld cannot account for sampling: fixed: take accountant: rdp, or sampling: poisson")
        self._on_devices_possible()
        for name, (least, most) in (self.metrics or {}).items():
            if not least < most:
                raise ValueError(f"metrics.{name}: {least:g} to {most:g} is no range; give the smallest value first")
        return self

    def _on_devices_possible(self) -> None:
        """Raises ValueError: clients add the noise, and another setting is about noise that the coordinator adds."""
        if self.mode != DISTRIBUTED and self.honest != 1:
            raise ValueError(
                f"honest {self.honest:g} is for mode: distributed, where each client adds a part of the noise: remove it"
            )
        if not self.on_devices:
            return
        if self.sampling != "none":
            raise ValueError(
                f"sampling: {self.sampling} contradicts mode: {self.mode}: that nobody learns who was drawn is the coordinator's "
                "word, which this mode does not rest on: take sampling: none, or mode: central"
            )
        if self.discrete:
            raise ValueError(f"discrete is for noise that the coordinator adds, and in mode: {self.mode} clients do: remove it")
        if self.mode == DISTRIBUTED and self.accountant == "pld":
            raise ValueError("accountant: pld cannot account for the noise of mode: distributed: take rdp")
        if self.mode == LOCAL and self.adaptive is not None:
            raise ValueError("adaptive contradicts mode: local, where how many updates were shortened drowns in noise: give clip")

    @property
    def drawn_by(self) -> Sampling:
        """How cohorts are drawn."""
        return Sampling(self.sampling)

    @property
    def counted_by(self) -> Accountant:
        """How ε is counted."""
        return Accountant(self.accountant)

    def source(self) -> Noise:
        """Where noise comes from, anew for each release."""
        return discrete_gaussian() if self.discrete else gaussian()

    @property
    def shares(self) -> Shares:
        """How a training round's privacy is divided."""
        return Shares(_CLIP_SHARE if self.adaptive is not None else 0.0, self.metrics_share if self.metrics is not None else 0.0)

    @property
    def on_devices(self) -> bool:
        """Whether clients add the noise."""
        return self.mode != CENTRAL

    def noise_in(self, kind: Kind, expected: int, cohort_size: int) -> float:
        """The noise in a round. A mean over everybody bears more of it, as it gets no cheaper by being drawn."""
        return self.noise if kind is Kind.TRAINING or self.mode == LOCAL else self.noise * max(1.0, expected / cohort_size)

    def charged(self, noise: float) -> float:
        """What noise is counted as."""
        return as_gaussian(noise) if self.mode == DISTRIBUTED else noise

    def release(self, noise: float, sampling: Sampling = Sampling.NONE, expected: int = 1, population: int = 1) -> Release:
        """A round with this noise, as it is counted."""
        return Release(self.charged(noise), sampling, expected, population, self.mode == DISTRIBUTED)

    def must_suit(self, weight_cap: int | None, over_selection: float, max_update_norm: float | None, secure: bool) -> None:
        """Raises ValueError: other settings of the run would make untrue what is counted."""
        if weight_cap not in (None, 1):
            raise ValueError(
                f"weight_cap {weight_cap} contradicts privacy: with weights by examples, noise that hides a client with few does "
                "not hide one with many: leave it out, and each client counts alike"
            )
        if over_selection:
            raise ValueError(
                f"over_selection {over_selection:g} contradicts privacy: who is fast would push out who is not, and a client could "
                "move the sum by another's result, too: leave it out, and raise cohort_size"
            )
        if max_update_norm is not None:
            raise ValueError(
                f"max_update_norm {max_update_norm:g} contradicts privacy: that an update is refused tells of it; clip shortens it"
            )
        if secure != (self.mode == DISTRIBUTED):
            raise ValueError(
                "mode: distributed puts the noise into the sum of secure_aggregation: turn that on, or take another mode"
                if not secure
                else f"secure_aggregation contradicts privacy.mode {self.mode}: the coordinator does not see what it would "
                "clip, and of noise in a sum each client need add only a part: take mode: distributed"
            )

    def too_large(self, size: int) -> str | None:
        """Why an update of so many elements cannot be clipped so finely; None: it can."""
        rounding = math.sqrt(size) / 2 * self.shares.update(self.noise) / STEPS
        if rounding < _LARGEST_ROUNDING:
            return None
        return f"run.privacy.noise {self.noise:g}: rounding moves {size} elements by {rounding:.2g} of the clip: lower it"


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of the privacy of a round that tells more than one thing, each with its own noise: together they cost as one."""

    clip: float
    metrics: float

    def update(self, total: float) -> float:
        """The noise on the update for a `total` of all: 1/total² = 1/update² + 1/clip² + 1/metrics²."""
        return total / math.sqrt(1 - self.clip - self.metrics)


def noise_of(share: float, total: float) -> float:
    """The noise on what gets `share` of a `total`."""
    return total / math.sqrt(share)

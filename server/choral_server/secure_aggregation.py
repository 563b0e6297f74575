"""Whether and how results are summed so that the coordinator sees the sum alone: the part of the configuration that says so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from choral.config import Settings
from choral.errors import ConfigError
from choral.plan import Kind, SecurePlan
from choral.secagg.fixed_point import FixedPoint, fixed_point
from choral.secagg.graph import COMPLETE_UP_TO, shape_of
from pydantic import Field

LARGEST_COHORT = 1000  # clients: each is told of all the others
FEW = 5  # clients: fewer are warned of
_RESOLVED_BITS = 8  # how finely the update of a client with one example is told, below the clip


class SecureAggregation(Settings):
    """Masks that cancel in the sum. What is derived is safe; what is given and is not is refused."""

    minimum_cohort: Annotated[int, Field(ge=2, le=LARGEST_COHORT)] = 3
    """fewest clients in a sum; with 2, each of them knows the other's part, and both devices must allow it in their guards"""
    threshold: Annotated[float, Field(gt=2 / 3, le=1)] | None = None
    """share of those who hold shares of a secret who must reveal them, for cohorts of up to 100; just over two thirds, which is the
    least that is safe and survives the most dropouts, if not given"""
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    """largest magnitude of an entry of an update; what is beyond is cut off on the device, and it is told how many did so"""
    ring_bits: Literal[32, 64] = 32
    """bits of each entry of a sum; 64 doubles the upload and rounds as little as without secure aggregation"""
    fraction_bits: int | None = None
    """bits behind the point; as many as a sum of cohort_size clients cannot overflow with, if not given"""
    groups: Annotated[int, Field(ge=1, le=100)] = 1
    """into how many groups the clients of a training round are divided, each with a sum of its own; the model is moved by the
    median over the groups, so that clients that send nonsense spoil their group's sum and not the model; the coordinator sees the
    sum of each group"""
    step_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 30.0
    """seconds that clients have for each step once the round's results are ready; an upload that advances may take longer"""

    def groups_of(self, kind: Kind) -> int:
        """Into how many groups the clients of a round are divided: statistics and measurements are sums, of which there is one."""
        return self.groups if kind is Kind.TRAINING else 1

    def scale(self, clients: int) -> FixedPoint:
        """How entries are rounded in a sum of so many. Raises ConfigError, with the arithmetic."""
        return fixed_point(clients, self.clip, self.ring_bits, self.fraction_bits)

    @property
    def largest_cohort(self) -> int:
        """How many clients a sum may have."""
        return LARGEST_COHORT if self.threshold is None else COMPLETE_UP_TO

    def plan(self, kind: Kind, run: str, clients: int, weight_cap: int, max_norm: float | None) -> SecurePlan:
        """What the clients of a round of at most so many are told. Raises ConfigError, of a training round that is too large."""
        share, norm = self.threshold or 0.0, max_norm or 0.0
        scale = self.scale(clients) if kind is Kind.TRAINING else fixed_point(clients, self.clip, 64)  # of nothing: any will do
        terms = share, self.clip, scale.fraction_bits, scale.ring_bits
        return SecurePlan(run, self.minimum_cohort, clients, *terms, weight_cap, norm)

    def must_suit(self, cohort_size: int, quorum: int, weight_cap: int, *, private: bool = False) -> None:
        """Raises ValueError, with the arithmetic: a round of this size cannot be summed so, or not safely, or not well."""
        if private:
            self._must_suit_privacy()
        if cohort_size > LARGEST_COHORT:
            raise ValueError(
                f"secure_aggregation sums {LARGEST_COHORT} clients at the most, and cohort_size is {cohort_size}: lower that"
            )
        if quorum < self.minimum_cohort:
            raise ValueError(
                f"a sum of {quorum} clients (quorum, or cohort_size) is less than secure_aggregation.minimum_cohort "
                f"{self.minimum_cohort}: raise the one, or lower the other; below 3 it hides nothing from the other client"
            )
        if self.groups == 2:
            raise ValueError("secure_aggregation.groups: 2: the median of two is their mean; give 3 or more, or leave it out")
        if quorum // self.groups < self.minimum_cohort:
            raise ValueError(
                f"secure_aggregation.groups {self.groups}: of {quorum} clients (quorum, or cohort_size) a group has "
                f"{quorum // self.groups}, and minimum_cohort is {self.minimum_cohort}: fewer groups, or a larger quorum"
            )
        try:
            shape_of(cohort_size, self.threshold or 0.0)
            scale = None if private else self.scale(cohort_size)  # what is private has steps of its own
        except ConfigError as error:
            raise ValueError(f"secure_aggregation: {error}") from None
        if scale is not None:
            self._must_resolve(weight_cap, scale)

    def _must_suit_privacy(self) -> None:
        """Raises ValueError: what each client adds is bounded by run.privacy, and its noise is for one sum."""
        if self.groups > 1:
            raise ValueError(
                f"secure_aggregation.groups {self.groups} contradicts privacy: noise that is enough for one sum of all "
                "would have to be in each group's: remove groups"
            )
        for name in sorted({"clip", "fraction_bits"} & self.model_fields_set):
            raise ValueError(f"secure_aggregation.{name} contradicts privacy, whose clip and noise say how to round: remove it")

    def _must_resolve(self, weight_cap: int, scale: FixedPoint) -> None:
        """Raises ValueError: a client with few examples would drown in the rounding."""
        steps = self.clip * 2.0**scale.fraction_bits
        if weight_cap * 2**_RESOLVED_BITS > steps:
            raise ValueError(
                f"weight_cap {weight_cap} with secure_aggregation: a client with one example weighs 1/{weight_cap}, and clip "
                f"{self.clip:g} with {scale.fraction_bits} bits behind the point has {steps:.0f} steps, which leaves it "
                f"{steps / weight_cap:.3g} of them; at least {2**_RESOLVED_BITS} are needed: weight_cap at most "
                f"{int(steps) >> _RESOLVED_BITS}, or ring_bits: 64"
            )


def switched(value: Any) -> Any:
    """`true` is all defaults, `false` is none."""
    return {} if value is True else None if value is False else value

"""What noised releases cost: ε of (ε, δ)-differential privacy for a client, all its examples together, by Google's dp-accounting.

No formula here is our own. The library needs SciPy and two seconds to import, so it is an extra and imported when first needed.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from choral.errors import ConfigError

_MOST_ROUNDS = 1 << 20
_LEAST_NOISE, _MOST_NOISE = 0.05, 1e4
_TOLERANCE = 1e-4  # of a noise that was looked for


class Sampling(enum.Enum):
    """How the clients of a round are drawn from those that are there.

    POISSON: each by itself with the same probability; one client more or less moves the sum by the clip at most. FIXED: so many of
    them, uniformly; another client in place of one moves it by twice the clip. NONE: in a way that nothing is made of.
    """

    POISSON = "poisson"
    FIXED = "fixed"
    NONE = "none"


class Accountant(enum.Enum):
    """RDP: Rényi (Mironov 2017), fast. PLD: privacy loss distributions (Koskela et al. 2020), tighter, slower, not for FIXED."""

    RDP = "rdp"
    PLD = "pld"


@dataclass(frozen=True, slots=True)
class Release:
    """A sum over clients, each of which can move it by 1, with Gaussian noise of standard deviation `noise`.

    `expected` of `population` clients were drawn by `sampling`.
    """

    noise: float
    sampling: Sampling = Sampling.NONE
    expected: int = 1
    population: int = 1


def epsilon(
    releases: Mapping[Release, int], delta: float, accountant: Accountant = Accountant.RDP, *, amplified: bool = True
) -> float:
    """ε of all these releases together, each made so many times.

    `amplified`: for somebody who cannot know who was drawn; otherwise for one who does. Raises ConfigError: the library is missing,
    or the accountant cannot do it.
    """
    if not any(releases.values()):
        return 0.0
    dp, replaced = _library(), any(release.sampling is Sampling.FIXED for release in releases)
    one = dp.NeighboringRelation.REPLACE_ONE if replaced else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    made = _rdp().RdpAccountant(neighboring_relation=one) if accountant is Accountant.RDP else _pld(dp, replaced, amplified)
    for release, count in releases.items():
        if count:
            made.compose(_event(dp, release, amplified, replaced), count)
    return float(made.get_epsilon(delta))


def noise_for(
    target_epsilon: float,
    delta: float,
    releases: Callable[[float], Mapping[Release, int]],
    accountant: Accountant = Accountant.RDP,
) -> float:
    """The least noise with which `releases(noise)` cost no more than `target_epsilon`, to four digits.

    Raises ConfigError: no noise up to 10 000 is enough, or as `epsilon`.
    """

    def costs(noise: float) -> float:
        return epsilon(releases(noise), delta, accountant)

    low, high = _LEAST_NOISE, 1.0
    while costs(high) > target_epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ConfigError(f"no noise up to {_MOST_NOISE:g} keeps ε at {target_epsilon:g}: allow more, or ask for fewer rounds")
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if costs(middle) > target_epsilon else (low, middle)
    return high


def rounds_for(
    target_epsilon: float,
    delta: float,
    release: Release,
    accountant: Accountant = Accountant.RDP,
    spent: Mapping[Release, int] | None = None,
) -> int:
    """How many times more `release` can be made within `target_epsilon`; at most 2^20 are looked at. Raises as `epsilon`."""
    before = dict(spent or {})

    def fits(count: int) -> bool:
        return epsilon({**before, release: before.get(release, 0) + count}, delta, accountant) <= target_epsilon

    low, high = 0, 1
    while high <= _MOST_ROUNDS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _event(dp: Any, release: Release, amplified: bool, replaced: bool) -> Any:
    """As the library counts it; where one client replaces another, the sum moves twice as far."""
    if replaced:
        release = replace(release, noise=release.noise / 2)
    gaussian = dp.GaussianDpEvent(release.noise)
    if not amplified or release.expected >= release.population:
        return gaussian
    if release.sampling is Sampling.FIXED:
        return dp.SampledWithoutReplacementDpEvent(release.population, release.expected, gaussian)
    if release.sampling is Sampling.POISSON and not replaced:  # of both kinds together the library knows nothing better
        return dp.PoissonSampledDpEvent(release.expected / release.population, gaussian)
    return gaussian


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError(f"privacy accounting needs the extra privacy ({error}): pip install 'choral[privacy]'") from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of each order that it leaves out, which only makes ε larger
    return dp_accounting


def _rdp() -> Any:
    from dp_accounting import rdp

    return rdp


def _pld(dp: Any, replaced: bool, amplified: bool) -> Any:
    if replaced and amplified:
        raise ConfigError("accountant pld cannot account for sampling fixed: take accountant rdp, or sampling poisson")
    from dp_accounting import pld

    one = dp.NeighboringRelation.REPLACE_ONE if replaced else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    return pld.PLDAccountant(neighboring_relation=one)

"""What noised releases cost: ε of (ε, δ)-differential privacy for a client, all its examples together, by Google's dp-accounting.

No formula here is our own. The library needs SciPy and two seconds to import, so it is an extra and imported when first needed.
"""

from __future__ import annotations

import copy
import enum
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from choral.errors import ConfigError
from choral.privacy.gaussian import WHOLE_ORDERS

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
    """RDP: Rényi (Mironov 2017). PLD: privacy loss distributions (Koskela et al. 2020), tighter, slower; RDP where one is FIXED."""

    RDP = "rdp"
    PLD = "pld"


@dataclass(frozen=True, slots=True)
class Release:
    """A sum over clients, each of which can move it by 1, with Gaussian noise of standard deviation `noise`.

    `expected` of `population` clients were drawn by `sampling`. `whole`: the noise is only known to cost no more than a Gaussian at
    whole orders of Rényi differential privacy (`skellam`).
    """

    noise: float
    sampling: Sampling = Sampling.NONE
    expected: int = 1
    population: int = 1
    whole: bool = False


def epsilon(
    releases: Mapping[Release, int], delta: float, accountant: Accountant = Accountant.RDP, *, amplified: bool = True
) -> float:
    """ε of all these releases together, each made so many times.

    `amplified`: for somebody who cannot know who was drawn; otherwise for one who does. Raises ConfigError: the library is missing,
    or the accountant cannot do it.
    """
    return Account(accountant, amplified).epsilon(releases, delta)


class Account:
    """ε of releases that become more and more: what was `settled` is not counted from the beginning again."""

    def __init__(self, accountant: Accountant = Accountant.RDP, amplified: bool = True) -> None:
        self._accountant = accountant
        self._amplified = amplified
        self._settled: Counter[Release] = Counter()
        self._made: Any = None
        self._how = _How()

    def settle(self, releases: Mapping[Release, int]) -> None:
        """These are all until now, and will stay. Raises as `epsilon`."""
        how = _How.of(releases)
        if self._made is None or how != self._how or self._settled - Counter(releases):
            self._made, self._settled, self._how = self._fresh(how), Counter(), how
        self._compose(self._made, Counter(releases) - self._settled, how)
        self._settled = Counter(releases)

    def epsilon(self, releases: Mapping[Release, int], delta: float) -> float:
        """ε of all these releases together, whatever is settled of them. Raises ConfigError, as the function."""
        if not any(releases.values()):
            return 0.0
        how, more = _How.of(releases), Counter(releases) - self._settled
        known = self._made is not None and how == self._how and not self._settled - Counter(releases)
        made = copy.deepcopy(self._made) if known else self._fresh(how)
        self._compose(made, more if known else releases, how)
        return float(made.get_epsilon(delta))

    def _compose(self, made: Any, releases: Mapping[Release, int], how: _How) -> None:
        dp = _library()
        for release, count in releases.items():
            if count:
                made.compose(_event(dp, release, self._amplified, how.replaced), count)

    def _fresh(self, how: _How) -> Any:
        dp = _library()
        one = dp.NeighboringRelation.REPLACE_ONE if how.replaced else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
        if self._accountant is Accountant.RDP or how.replaced or how.whole:  # PLD knows neither, and RDP is never too low
            from dp_accounting import rdp

            return rdp.RdpAccountant(WHOLE_ORDERS if how.whole else None, neighboring_relation=one)
        from dp_accounting import pld

        return pld.PLDAccountant(neighboring_relation=one)


@dataclass(frozen=True, slots=True)
class _How:
    """What decides how releases are counted together: whether one client replaces another, and whether only whole orders hold."""

    replaced: bool = False
    whole: bool = False

    @classmethod
    def of(cls, releases: Iterable[Release]) -> _How:
        there = tuple(releases)
        return cls(any(one.sampling is Sampling.FIXED for one in there), any(one.whole for one in there))


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
    before, account = Counter(spent or {}), Account(accountant)
    account.settle(before)

    def fits(count: int) -> bool:
        return account.epsilon(before + Counter({release: count}), delta) <= target_epsilon

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

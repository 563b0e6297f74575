"""The arithmetic behind `choral privacy examples`: noise for an ε, or the ε of a noise, counted as the clients count it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass

from choral.errors import ConfigError
from choral.privacy.accounting import Release, Sampling, epsilon, noise_for

from choral_deploy.privacy_plan import as_yaml, rounded_up


@dataclass(frozen=True)
class Answer:
    """What a client with so many examples loses of each in so many rounds."""

    examples: int
    rounds: int
    steps: int
    noise: float
    delta: float
    epsilon: float

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))

    def print(self) -> None:
        """For people: the lines for the configuration, and what they promise."""
        budget = rounded_up(self.epsilon)
        cost = f"ε {self.epsilon:.4g} at δ {self.delta:g}"
        print(  # noqa: T201
            f"{self.steps} steps on {self.examples} examples with noise {self.noise:.4g} cost {cost}\n"
            f"run:\n  example_privacy: {{epsilon: {budget}, delta: {as_yaml(self.delta)}, noise: {self.noise:.10g}}}\n"
            "evaluation: {clients: false}"
        )


def answer(
    examples: int,
    rounds: int,
    batch_size: int,
    epochs: int,
    target_epsilon: float | None,
    noise: float | None,
    delta: float,
    *,
    statistics: bool,
) -> Answer:
    """Of `noise` and `target_epsilon` one is given. Raises ConfigError: both are, or neither, or they are no numbers to go by."""
    if (noise is None) == (target_epsilon is None):
        raise ConfigError("give --noise or --epsilon: the other one is found")
    if not 0 < delta <= 0.01:
        raise ConfigError(f"--delta {delta:g}: give a probability, well below one over the number of examples")
    for name, value, least, most in (("epsilon", target_epsilon, 0.0, 1e6), ("noise", noise, 0.05, 1e4)):
        if value is not None and not (least <= value <= most and value > 0):
            raise ConfigError(f"--{name} {value:g}: give a number above 0, from {least:g} to {most:g}")
    steps, expected = rounds * epochs * math.ceil(examples / batch_size), min(batch_size, examples)

    def releases(noise: float) -> Counter[Release]:
        drawn = Sampling.POISSON if expected < examples else Sampling.NONE
        made = Counter({Release(noise, drawn, expected, examples): steps})
        return made + Counter({Release(noise): 1}) if statistics else made

    found = noise if noise is not None else math.ceil(noise_for(target_epsilon or 0.0, delta, releases) * 1e4) / 1e4
    return Answer(examples, rounds, steps, found, delta, epsilon(releases(found), delta))

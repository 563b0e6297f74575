"""The arithmetic behind `choral privacy plan`: of noise, rounds and ε, what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from choral.errors import ConfigError
from choral.privacy.accounting import Accountant, Release, Sampling, epsilon, noise_for, rounds_for
from choral.privacy.skellam import as_gaussian

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is known: two of `rounds`, `epsilon` and `noise`, and how a cohort is drawn from the clients."""

    clients: int
    cohort: int
    rounds: int | None
    epsilon: float | None
    noise: float | None
    delta: float
    sampling: str
    accountant: str
    mode: str = "central"

    def release(self, noise: float) -> Release:
        """One round."""
        whole = self.mode == "distributed"
        return Release(as_gaussian(noise) if whole else noise, Sampling(self.sampling), self.cohort, self.clients, whole)


@dataclass(frozen=True)
class Answer:
    """All of it. `epsilon_models` is for those who get models, `epsilon_coordinator` for whoever knows who was drawn."""

    clients: int
    cohort: int
    rounds: int
    noise: float
    delta: float
    sampling: str
    accountant: str
    mode: str
    epsilon_models: float
    epsilon_coordinator: float

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))

    def print(self) -> None:
        """For people: the answer, and the lines for the configuration."""
        from rich.console import Console
        from rich.table import Table

        table = Table("what", "how much", "for whom, or why")
        table.add_row("rounds", str(self.rounds), f"{self.cohort} of {self.clients} clients each, sampling {self.sampling}")
        table.add_row("noise", f"{self.noise:.5g}", "standard deviation over what one client can move")
        table.add_row("ε", f"{self.epsilon_models:.6g}", f"who gets models and does not know who was drawn; δ {self.delta:g}")
        table.add_row("ε", f"{self.epsilon_coordinator:.6g}", "who knows who was drawn, of a client that is drawn each time")
        Console().print(table)
        print(  # noqa: T201
            f"run:\n  rounds: {self.rounds}\n  cohort_size: {self.cohort}\n  privacy:\n"
            f"    epsilon: {rounded_up(self.epsilon_models)}\n    delta: {as_yaml(self.delta)}\n"
            f"    noise: {rounded_up(self.noise)}\n    sampling: {self.sampling}\n"
            f"    accountant: {self.accountant}\n    mode: {self.mode}"
            + ("\n  secure_aggregation: true" if self.mode == "distributed" else "")
        )


def answer(question: Question) -> Answer:
    """Raises ConfigError: it cannot be answered, or the library is missing."""
    _check(question)
    delta, accountant = question.delta, Accountant(question.accountant)
    noise, rounds = question.noise, question.rounds
    if noise is None:
        assert question.epsilon is not None, "checked"
        assert rounds is not None, "checked"
        target, count = question.epsilon, rounds
        noise = _shown("noise", lambda: noise_for(target, delta, lambda noise: {question.release(noise): count}, accountant))
    if rounds is None:
        assert question.epsilon is not None, "checked"
        target, one = question.epsilon, question.release(noise)
        rounds = _shown("rounds", lambda: rounds_for(target, delta, one, accountant))
        if rounds == 0:
            raise ConfigError(f"--epsilon {target:g}: not enough for one round with noise {noise:g}: give more of either")
    releases = {question.release(noise): rounds}
    models, known = (
        _shown("ε", lambda amplified=amplified: epsilon(releases, delta, accountant, amplified=amplified))  # type: ignore[misc]
        for amplified in (True, False)
    )
    terms = question.sampling, question.accountant, question.mode
    return Answer(question.clients, question.cohort, rounds, noise, delta, *terms, models, known)


def _check(question: Question) -> None:
    given = [name for name in ("rounds", "epsilon", "noise") if getattr(question, name) is not None]
    if len(given) != 2:
        told = f"--{' and --'.join(given)}" if given else "none of them"
        raise ConfigError(f"give two of --rounds, --epsilon and --noise, and the third is found; {told} is given")
    if question.cohort > question.clients:
        raise ConfigError(f"--cohort {question.cohort}: is more than --clients {question.clients}; give at most that")
    if not 0 < question.delta <= 0.01:
        raise ConfigError(f"--delta {question.delta:g}: give a probability, well below one over the number of clients")
    for name, least, most in (("epsilon", 0.0, 1e6), ("noise", 0.05, 1e4)):
        value = getattr(question, name)
        if value is not None and not (least <= value <= most and value > 0):
            raise ConfigError(f"--{name} {value:g}: give a number above 0, from {least:g} to {most:g}")
    if question.mode != "central" and question.sampling != "none":
        raise ConfigError(f"--mode {question.mode} does not go with --sampling {question.sampling}: add --sampling none")
    if (question.mode, question.accountant) == ("distributed", "pld"):
        raise ConfigError("--accountant pld cannot account for --mode distributed: take accountant rdp")
    if (question.sampling, question.accountant) == ("fixed", "pld"):
        raise ConfigError("--accountant pld cannot account for --sampling fixed: take accountant rdp, or sampling poisson")


def _shown(what: str, work: Callable[[], T]) -> T:
    """The result of `work`, which may take a while."""
    from rich.console import Console

    with Console(stderr=True).status(f"looking for {what}"):
        return work()


def as_yaml(delta: float) -> str:
    """As YAML reads a number: 1e-05 would be a text."""
    mantissa, _, exponent = f"{delta:g}".partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if exponent else mantissa


def rounded_up(number: float) -> str:
    """Four digits, never less than the number."""
    number = max(number, 1e-4)
    digits = 4 - math.ceil(math.log10(number))
    return f"{math.ceil(number * 10**digits) / 10**digits:g}"

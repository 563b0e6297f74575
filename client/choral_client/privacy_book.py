"""How much privacy this device has lost, in a file: whatever coordinators ask and count, it is written here before anything leaves.

Each loss is one line, written down for good before the result that causes it is saved to be sent. Work that is done again has other
noise, and costs again.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from choral.durable import sync_folder, write_all
from choral.errors import ConfigError, Declined
from choral.plan import Kind, Plan
from choral.privacy.accounting import Account, Release, Sampling
from choral.privacy.gaussian import epsilon_of, epsilon_of_integers
from choral.privacy.skellam import as_gaussian

NAME = "privacy.jsonl"
CLIENT, EXAMPLE = "client", "example"
"""what the noise hides: everything that this client has, or each single example of it"""


@dataclass(frozen=True, slots=True)
class Loss:
    """One result: noise of `noise` over what whoever is `hidden` can move, in each of so many `steps`.

    `expected` of `population` examples were drawn for each step. `whole`: the noise is Skellam's.
    """

    hidden: str
    noise: float
    whole: bool = False
    expected: int = 1
    population: int = 1
    steps: int = 1


def hidden_by(plan: Plan) -> frozenset[str]:
    """What noise of this device's hides in all that a plan asks for."""
    if plan.private is not None:
        return frozenset({CLIENT})
    measured = plan.evaluate or plan.kind is Kind.EVALUATION
    return frozenset({EXAMPLE}) if plan.examples is not None and not measured else frozenset()


def losses_of(plan: Plan, examples: int) -> tuple[Loss, ...]:
    """What an assignment costs on so many examples."""
    if (terms := plan.private) is not None:
        masked = plan.secure is not None
        return (Loss(CLIENT, as_gaussian(terms.noise) if masked else terms.noise, masked),)
    if (hiding := plan.examples) is None or plan.kind is Kind.EVALUATION:
        return ()
    if plan.kind is Kind.STATISTICS:
        return (Loss(EXAMPLE, hiding.noise),)
    steps, expected = plan.training.epochs * math.ceil(examples / plan.training.batch_size), min(plan.training.batch_size, examples)
    return (Loss(EXAMPLE, hiding.noise, False, expected, examples, steps),) if steps else ()


class PrivacyBook:
    """All losses so far. May be used from several threads, and by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._writing = threading.Lock()
        self._known: list[Loss] | None = None
        self._account = Account()

    def losses(self) -> list[Loss]:
        """Oldest first. Raises Declined: the file cannot be read, or is damaged."""
        with self._writing:
            return list(self._read())

    def epsilon(self, hidden: str, delta: float, more: Iterable[Loss] = ()) -> float:
        """ε of all that was lost of what is `hidden`, and of `more`. Raises Declined: as `losses`, or a library is missing."""
        with self._writing:
            there = [loss for loss in self._read() if loss.hidden == hidden]
            further = [loss for loss in more if loss.hidden == hidden]
            if hidden == CLIENT:
                return epsilon_of_client([*there, *further], delta)
            try:
                self._account.settle(_releases(there))
                return self._account.epsilon(_releases([*there, *further]), delta)
            except ConfigError as error:
                raise Declined(str(error)) from error

    def charge(self, losses: Iterable[Loss], assignment: str, now: datetime) -> None:
        """Write losses down for good. Raises Declined: the disk is full or cannot be written, or as `losses`."""
        new = list(losses)
        with self._writing:
            known = self._read()
            lines = [json.dumps({"at": now.isoformat(), "assignment": assignment} | asdict(loss)) + "\n" for loss in new]
            try:
                _append(self._path, "".join(lines).encode())
            except OSError as error:
                self._known = None
                raise Declined(
                    f"{self._path}: what a result costs in privacy cannot be written down ({error.strerror}), so nothing is sent: "
                    "make room there"
                ) from error
            known.extend(new)

    def _read(self) -> list[Loss]:
        if self._known is None:
            try:
                self._known = list(_losses_in(self._path))
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise Declined(
                    f"{self._path}: how much privacy this device has lost cannot be read ({error}), so nothing is done: restore it"
                ) from error
        return self._known


def epsilon_of_client(losses: Iterable[Loss], delta: float) -> float:
    """ε of losses of all that a client has, none of which was drawn: exact for Gaussian noise, an upper bound for Skellam's."""
    there = list(losses)
    precision = math.fsum(loss.noise**-2 * loss.steps for loss in there)
    return (epsilon_of_integers if any(loss.whole for loss in there) else epsilon_of)(precision, delta)


def _releases(losses: Iterable[Loss]) -> Counter[Release]:
    counted: Counter[Release] = Counter()
    for loss in losses:
        drawn = Sampling.POISSON if loss.expected < loss.population else Sampling.NONE
        counted[Release(loss.noise, drawn, loss.expected, loss.population)] += loss.steps
    return counted


def _losses_in(path: Path) -> Iterator[Loss]:
    """Raises OSError, ValueError and others: it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole, newline, _ = content.rpartition(b"\n")
    if not newline and content:  # a crash while the first line was written: nothing was sent for it
        return
    for line in whole.splitlines():
        yield _loss(json.loads(line))


def _loss(read: dict[str, Any]) -> Loss:
    loss = Loss(**{name: read[name] for name in Loss.__slots__})
    numbers = loss.noise, loss.expected, loss.population, loss.steps
    if loss.hidden not in (CLIENT, EXAMPLE) or not all(isinstance(n, int | float) and 0 < n < math.inf for n in numbers):
        raise ValueError(f"a loss of {read}")
    return loss


def _append(path: Path, lines: bytes) -> None:
    """Add lines behind the last whole one, so that they are there when this returns."""
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        kept = os.pread(descriptor, os.lseek(descriptor, 0, os.SEEK_END), 0).rfind(b"\n") + 1
        os.ftruncate(descriptor, kept)  # what a crash, or a full disk, left half-written
        os.lseek(descriptor, kept, os.SEEK_SET)
        write_all(descriptor, memoryview(lines))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)

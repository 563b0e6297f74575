"""What this device refuses to do: a file of its owner, which no coordinator can see or change."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import structlog
from choral.address import HostPort
from choral.config import Settings
from choral.errors import Declined
from choral.fingerprint import parse_fingerprint
from choral.names import NAME
from choral.plan import Kind, Plan, SecurePlan
from pydantic import Field, PlainValidator, model_validator

from choral_client.masking import Floor
from choral_client.privacy_book import CLIENT, EXAMPLE, hidden_by

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_DAY = 24 * 60  # minutes
_LEAST_IN_SUM = 3  # clients: of two, each knows the other's
T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Window:
    """A span of each day, in minutes since midnight by the wall clock: `begin` belongs to it, `end` does not."""

    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read HH:MM-HH:MM; it may run over midnight. Raises ValueError with the form that is expected."""
        match = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text)
        hours = [int(part) for part in match.groups()] if match is not None else []
        begin, end = (60 * hours[0] + hours[1], 60 * hours[2] + hours[3]) if hours else (_DAY, 0)
        if begin >= _DAY or end > _DAY or any(minutes > 59 for minutes in hours[1::2]):
            raise ValueError(f'{text!r} is no span of a day; write it in quotes as "HH:MM-HH:MM", for example "22:00-06:00"')
        if begin == end:
            raise ValueError(f"{text!r} begins when it ends; leave hours out to allow the whole day")
        return cls(begin, end)

    def __contains__(self, now: datetime) -> bool:
        minute = 60 * now.hour + now.minute
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end

    def __str__(self) -> str:
        return f"{self.begin // 60:02}:{self.begin % 60:02}-{self.end // 60:02}:{self.end % 60:02}"


def _window(value: Any) -> Window:
    if not isinstance(value, str):
        raise ValueError('write it in quotes as "HH:MM-HH:MM", for example "22:00-06:00"')
    return Window.parse(value)


def _network(value: Any) -> _Network:
    try:
        if not isinstance(value, str):
            raise ValueError("it is no text")
        return ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"write a network as 192.168.1.0/24 or fd00::/8 ({error})") from None


def _fingerprint(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("write the fingerprint as text, in quotes")
    return parse_fingerprint(value)


class Guard(Settings):
    """The whole file. What is not given is not limited; a plan outside of what is given is declined with the reason."""

    tasks: dict[str, list[str]] | None = None
    """allowed tasks: the name of each, with the list of its allowed versions, as text; whatever is allowed, only the installed task
    is ever run; the installed task alone, if not given"""
    max_epochs: Annotated[int, Field(ge=0)] | None = None
    """most passes over the local examples that one round may train"""
    max_work_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """longest local work for one round, in seconds; what takes longer is stopped at the next batch, and nothing of it is sent"""
    max_work_s_per_day: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    """longest local work in one day from midnight to midnight, in seconds, all rounds and restarts taken together"""
    min_cohort: Annotated[int, Field(ge=1)] | None = None
    """least number of results that a round is to be made of; in a secure sum this device sees for itself that they are so many, or
    3 if nothing is given, because of two each knows the other's; otherwise it is the coordinator's word, which keeps away from
    small rounds of an honest coordinator, and from no lie"""
    min_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """in a secure sum, the least share of those who hold shares of a secret who must reveal them; of a cohort of up to 100 it is
    more than two thirds, whatever is given"""
    secure_aggregation: bool = False
    """take part only where the coordinator sees nothing but the sum over a cohort: of updates, of statistics, and of measurements
    too, for a loss is computed from the examples, and who may choose the model that is measured can read them out of it"""
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """most privacy that all of this client's data together may lose, as ε of differential privacy, over everything that this device
    has ever sent; it counts itself, what it sends with noise of its own (run.privacy.mode distributed or local at the coordinator),
    and declines everything else: noise that the coordinator adds is the coordinator's word"""
    max_example_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """the same of each single example, of what is trained so that it is hidden (run.example_privacy at the coordinator); everything
    else is declined; needs choral[privacy] on this device"""
    honest: Annotated[float, Field(gt=0, le=1)] = 1.0
    """in a secure sum whose noise clients share, the share of the fewest that may be in it on whose noise this owner counts: below
    1 if some of them may be the coordinator's own; noise that is divided among more is declined"""
    delta: Annotated[float, Field(gt=0, le=0.01)] = 1e-5
    """the δ for which max_epsilon and max_example_epsilon hold"""
    clients: dict[Annotated[str, Field(pattern=NAME)], Annotated[str, PlainValidator(_fingerprint)]] | None = None
    """who else may take part in a secure sum with this device: the name of each, with the fingerprint of its signing key, which
    `choral client fingerprint` prints on its device; nobody else is accepted, and none of these with another key, whatever an
    authority says; this device itself need not be named; whoever an authority certifies, if not given"""
    authority: Annotated[Path, Field(strict=False)] | None = None
    """PEM file with the certificate of the authority that certifies the signing keys of the others, for example one that is not the
    coordinator's; a relative path counts from the guard's folder; that which this client trusts for TLS, if not given"""
    hours: list[Annotated[Window, PlainValidator(_window)]] | None = None
    """spans of the day, by this device's own clock, in which it works, sends and fetches versions: for example "22:00-06:00", which
    runs over midnight"""
    networks: list[Annotated[_Network, PlainValidator(_network)]] | None = None
    """networks from which it works, sends, and fetches versions: its own address on the way to the coordinator must lie in one of
    them, for example 192.168.1.0/24"""

    @model_validator(mode="after")
    def _one_word(self) -> Self:
        if self.clients is not None and self.authority is not None:
            raise ValueError("clients contradicts authority, which would not be asked for any of them: remove one of the two")
        return self

    def check(self, plan: Plan, now: datetime, address: IPAddress | None) -> None:
        """Raises Declined: the plan is outside of what is allowed, or as `check_sending`."""
        if self.tasks is not None and plan.task_version not in self.tasks.get(plan.task, ()):
            raise Declined(_told("tasks", f"task {plan.task} {plan.task_version}", self._tasks_told()))
        if self.max_epochs is not None and plan.kind is Kind.TRAINING and plan.training.epochs > self.max_epochs:
            raise Declined(_told("max_epochs", f"{plan.training.epochs} epochs", f"at most {self.max_epochs}"))
        if self.min_cohort is not None and plan.cohort < self.min_cohort:
            raise Declined(_told("min_cohort", f"a cohort of {plan.cohort}", f"at least {self.min_cohort}"))
        if plan.secure is not None and plan.secure.most_clients < (least := self.floor(plan.secure).least_clients):
            raise Declined(_told("min_cohort", f"a secure sum of {plan.secure.most_clients}", f"at least {least}"))
        if plan.secure is not None and plan.private is not None:
            self._check_sharing(plan.private.clients, self.floor(plan.secure).least_clients)
        self.check_sending(now, address, masked=plan.secure is not None, hidden=hidden_by(plan))

    def _check_sharing(self, clients: int, least: int) -> None:
        """Raises Declined: noise is shared among more than this owner counts on."""
        if clients > max(1, int(self.honest * least)):
            told = f"noise that is divided among {clients} clients of a sum of {least} or more"
            raise Declined(_told("honest", told, f"at most {max(1, int(self.honest * least))}"))

    def cap(self, hidden: str) -> float | None:
        """The most that may be lost of what is `hidden`; None: any."""
        return self.max_epsilon if hidden == CLIENT else self.max_example_epsilon

    def check_loss(self, hidden: str, epsilon: float, now_epsilon: float) -> None:
        """Whether the loss of what is `hidden` may become `epsilon`. Raises Declined, without telling what other runs have cost."""
        allowed = self.cap(hidden)
        if allowed is not None and epsilon > allowed:
            key = "max_epsilon" if hidden == CLIENT else "max_example_epsilon"
            log.warning("no privacy is left", lost=now_epsilon, this_would_make_it=epsilon, allowed=allowed, delta=self.delta)
            raise Declined(
                f"this device's guard allows no further loss of privacy ({key}); the device's log says how much there was"
            )

    def floor(self, secure: SecurePlan) -> Floor:
        """What this device asks of a secure sum, or the coordinator, if that is more."""
        least = self.min_cohort if self.min_cohort is not None else _LEAST_IN_SUM
        return Floor(max(least, secure.least_clients, 2), self.min_threshold or 0.0)

    def check_sending(
        self, now: datetime, address: IPAddress | None, *, masked: bool, hidden: Collection[str] = frozenset()
    ) -> None:
        """Whether anything that was computed from the examples may leave; `hidden` says what noise of this device's hides in it.

        Raises Declined: it may not, or as `check_conditions`.
        """
        if self.secure_aggregation and not masked:
            raise Declined(
                "this device's guard requires secure_aggregation, and the coordinator does not ask for it "
                "(run.secure_aggregation in its configuration)"
            )
        if self.max_epsilon is not None and CLIENT not in hidden:
            raise Declined(
                f"this device's guard bounds the privacy that may be lost (max_epsilon: {self.max_epsilon:g}), and the coordinator "
                "does not ask for noise of this device's own (run.privacy.mode: distributed or local); noise that the coordinator "
                "adds is the coordinator's word"
            )
        if self.max_example_epsilon is not None and EXAMPLE not in hidden:
            raise Declined(
                "this device's guard bounds what may be lost of a single example (max_example_epsilon: "
                f"{self.max_example_epsilon:g}), and the coordinator does not ask to hide it (run.example_privacy)"
            )
        self.check_conditions(now, address)

    def check_conditions(self, now: datetime, address: IPAddress | None) -> None:
        """Whether this is the time and the place. `now` is local time, `address` the device's own; None: it has none at present.

        Raises Declined.
        """
        if self.hours is not None and not any(now in window for window in self.hours):
            raise Declined(_told("hours", f"work at {now:%H:%M}", ", ".join(map(str, self.hours)) or "no time of day"))
        if self.networks is not None and not any(address in network for network in self.networks if address is not None):
            told = f"work from {address}" if address is not None else "work without a way to the coordinator"
            raise Declined(_told("networks", told, ", ".join(map(str, self.networks)) or "no network"))

    def _tasks_told(self) -> str:
        return ", ".join(f"{name} {version}" for name, versions in (self.tasks or {}).items() for version in versions) or "no task"


def _told(key: str, asked: str, allowed: str) -> str:
    return f"this device's guard does not allow {asked}; it allows {allowed} ({key})"


def address_towards(server: HostPort) -> IPAddress | None:
    """This device's own address on the way to `server`; None: there is no way. Resolves the name, and sends it nothing."""
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in found:  # in the order in which a connection tries them
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # UDP: this picks the route, and no packet leaves
                return ipaddress.ip_address(str(probe.getsockname()[0]).partition("%")[0])
        except OSError:
            continue
    return None

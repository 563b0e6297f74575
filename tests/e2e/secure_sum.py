"""A secure sum with all its clients in one place, to be led through its steps by a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from choral.errors import Deceived
from choral.secagg.roster import Advert, Roster, Signer, Terms
from choral_client.masking import Floor, Masking, Revealed
from choral_server.unmasking import Unmasking
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TERMS = Terms("run", 3, b"\x01" * 32, b"\x02" * 32)
Vector = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass
class People:
    """Clients with their signing keys, which everybody knows."""

    signing: dict[str, Ed25519PrivateKey]

    @classmethod
    def named(cls, names: Iterable[str]) -> People:
        return cls({name: Ed25519PrivateKey.generate() for name in names})

    def key_of(self, client: str) -> bytes:
        return self.signing[client].public_key().public_bytes_raw()

    def signer(self, client: str) -> Signer:
        return Signer(self.signing[client].sign, self.key_of(client))

    def vouch(self, said: Advert) -> None:
        if said.client not in self.signing or said.key != self.key_of(said.client):
            raise Deceived(f"{said.client} is not known here, or not by this key")

    def masking(self, client: str, least: int = 2, terms: Terms = TERMS) -> Masking:
        return Masking(terms, client, self.signer(client), self.vouch, Floor(least), Spent())


class Spent:
    """Remembers the rounds in which a client has revealed what it holds."""

    def __init__(self) -> None:
        self._rounds: set[tuple[str, int]] = set()

    def __call__(self, terms: Terms) -> None:
        if (terms.run, terms.round) in self._rounds:
            raise Deceived(f"this client has revealed what it holds of round {terms.round} of run {terms.run} before")
        self._rounds.add((terms.run, terms.round))


@dataclass
class SecureSum:
    """Everybody's side, and what each has sent."""

    people: People
    least: int = 2
    coordinator: Unmasking = field(init=False)
    clients: dict[str, Masking] = field(init=False)
    sent: dict[str, Vector] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinator = Unmasking(TERMS, self.people.vouch, self.least)
        self.clients = {name: self.people.masking(name) for name in self.people.signing}

    def advertise(self, names: Iterable[str]) -> Roster:
        for name in names:
            self.coordinator.take_advert(self.clients[name].advertise())
        return self.coordinator.close_adverts()

    def share(self, names: Iterable[str]) -> None:
        for name in names:
            self.coordinator.take_shares(name, self.clients[name].take_roster(self.coordinator.roster))

    def send(self, names: Iterable[str], vectors: Mapping[str, Vector]) -> None:
        for name in names:
            masked = vectors[name].copy()
            self.clients[name].take_shares(self.coordinator.shares_for(name)).add_to(masked)
            self.sent[name] = masked

    def sign(self, names: Iterable[str]) -> None:
        for name in names:
            self.coordinator.take_signature(name, self.clients[name].take_survivors(self.coordinator.survivors))

    def reveal(self, names: Iterable[str], change: Callable[[Revealed], Revealed] = lambda revealed: revealed) -> None:
        for name in names:
            revealed = change(self.clients[name].reveal(self.coordinator.signatures_for(name)))
            self.coordinator.take_revealed(name, revealed.mask_seeds, revealed.key_seeds)

    def unmasked(self) -> Vector:
        total = sum(self.sent.values(), np.zeros_like(next(iter(self.sent.values()))))
        self.coordinator.mask().add_to(total)
        return total


def vectors_of(names: Iterable[str], size: int = 5) -> dict[str, Vector]:
    rng = np.random.default_rng(7)
    return {name: rng.integers(0, 2**32, size, dtype=np.uint32) for name in names}


def lead(people: People, leaves: Mapping[str, int], vectors: Mapping[str, Vector]) -> tuple[SecureSum, Vector]:
    """Lead a sum through; `leaves` says before which step a client goes away: 1 shares, 2 update, 3 signature, 4 revealing."""
    sum_, names = SecureSum(people), list(people.signing)

    def there(step: int) -> list[str]:
        return [name for name in names if leaves.get(name, 5) > step]

    sum_.advertise(names)
    sum_.share(there(1))
    sum_.send(there(2), vectors)
    sum_.coordinator.close(sum_.sent)
    sum_.sign(there(3))
    sum_.coordinator.close_signatures()
    sum_.reveal(there(4))
    return sum_, sum_.unmasked()

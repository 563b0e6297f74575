"""One secure sum among clients who are all in this process and all stay: the real protocol and real keys, without the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from choral.errors import Deceived
from choral.secagg import wide
from choral.secagg.roster import Advert, Signer, Terms
from choral.secagg.summand import Summand
from choral_client.masking import Floor, Masking
from choral_server.unmasking import Unmasking
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LEAST = 2


@dataclass(frozen=True)
class Summed:
    """What each client has uploaded, masked, and what the coordinator has in the end: the sum of what was not."""

    uploads: Mapping[str, bytes]
    total: bytes


def secure_sum(terms: Terms, summands: Mapping[str, Summand]) -> Summed:
    """Lead the clients through all steps of one sum of what they add, as choral_client.masking names them; that gets masked."""
    signing = {client: Ed25519PrivateKey.generate() for client in summands}
    known = {client: key.public_key().public_bytes_raw() for client, key in signing.items()}

    def vouch(said: Advert) -> None:
        if known.get(said.client) != said.key:
            raise Deceived(f"{said.client} is not known here by this key")

    def masking(client: str) -> Masking:
        signer = Signer(signing[client].sign, known[client])
        return Masking(terms, client, signer, vouch, Floor(LEAST), lambda _: None)  # it takes part once, and is gone

    coordinator, clients = Unmasking(terms, vouch, LEAST), {client: masking(client) for client in summands}
    _mask(coordinator, clients, summands)
    _reveal(coordinator, clients)
    uploads = {client: b"".join(one.pieces()) for client, one in summands.items()}
    first, *others = summands.values()
    for one in others:
        np.add(first.vector, one.vector, out=first.vector)
        wide.add(first.numbers, one.numbers)
    first.add_mask(coordinator.mask())
    return Summed(uploads, b"".join(first.pieces()))


def _mask(coordinator: Unmasking, clients: Mapping[str, Masking], summands: Mapping[str, Summand]) -> None:
    """Everybody shows keys and shares its secrets, and masks what it adds."""
    for one in clients.values():
        coordinator.take_advert(one.advertise())
    roster = coordinator.close_adverts()
    for client, one in clients.items():
        coordinator.take_shares(client, one.take_roster(roster))
    coordinator.close_shares()
    for client, one in clients.items():
        summands[client].add_mask(one.take_shares(coordinator.shares_for(client)))


def _reveal(coordinator: Unmasking, clients: Mapping[str, Masking]) -> None:
    """Everybody signs who has sent a masked result, and reveals its shares of what is left of the masks in the sum."""
    survivors = coordinator.close(clients)
    for client, one in clients.items():
        coordinator.take_signature(client, one.take_survivors(survivors))
    coordinator.close_signatures()
    for client, one in clients.items():
        revealed = one.reveal(coordinator.signatures_for(client))
        coordinator.take_revealed(client, revealed.mask_seeds, revealed.key_seeds)

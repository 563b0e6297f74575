"""One secure sum among clients who are all in this process and all stay: the real protocol and real keys, without the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from choral.errors import Deceived
from choral.secagg.fixed_point import Ring
from choral.secagg.roster import Advert, Signer, Terms
from choral_client.masking import Floor, Masking
from choral_server.unmasking import Unmasking
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LEAST = 2


@dataclass(frozen=True)
class Summed:
    """What each client has uploaded, masked, and what the coordinator has in the end: the sum of what was not."""

    uploads: Mapping[str, bytes]
    total: Ring


def secure_sum(terms: Terms, vectors: Mapping[str, Ring]) -> Summed:
    """Lead the clients through all steps of one sum of their vectors, as choral_client.masking names them."""
    signing = {client: Ed25519PrivateKey.generate() for client in vectors}
    known = {client: key.public_key().public_bytes_raw() for client, key in signing.items()}

    def vouch(said: Advert) -> None:
        if known.get(said.client) != said.key:
            raise Deceived(f"{said.client} is not known here by this key")

    def masking(client: str) -> Masking:
        signer = Signer(signing[client].sign, known[client])
        return Masking(terms, client, signer, vouch, Floor(LEAST), lambda _: None)  # it takes part once, and is gone

    coordinator, clients = Unmasking(terms, vouch, LEAST), {client: masking(client) for client in vectors}
    masked = _mask(coordinator, clients, vectors)
    _reveal(coordinator, clients, masked)
    total = np.zeros_like(next(iter(masked.values())))
    for vector in masked.values():
        np.add(total, vector, out=total)
    coordinator.mask().add_to(total)
    return Summed({client: vector.tobytes() for client, vector in masked.items()}, total)


def _mask(coordinator: Unmasking, clients: Mapping[str, Masking], vectors: Mapping[str, Ring]) -> dict[str, Ring]:
    """Everybody shows keys and shares its secrets; then each vector with its client's masks."""
    for one in clients.values():
        coordinator.take_advert(one.advertise())
    roster = coordinator.close_adverts()
    for client, one in clients.items():
        coordinator.take_shares(client, one.take_roster(roster))
    masked = {client: vector.copy() for client, vector in vectors.items()}
    for client, one in clients.items():
        one.take_shares(coordinator.shares_for(client)).add_to(masked[client])
    return masked


def _reveal(coordinator: Unmasking, clients: Mapping[str, Masking], masked: Mapping[str, Ring]) -> None:
    """Everybody signs who has sent a masked vector, and reveals its shares of what is left of the masks in the sum."""
    survivors = coordinator.close(masked)
    for client, one in clients.items():
        coordinator.take_signature(client, one.take_survivors(survivors))
    coordinator.close_signatures()
    for client, one in clients.items():
        revealed = one.reveal(coordinator.signatures_for(client))
        coordinator.take_revealed(client, revealed.mask_seeds, revealed.key_seeds)

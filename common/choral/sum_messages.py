"""What coordinator and client say to each other in a secure sum, as values; each names the client's assignment.

client                coordinator
SumAdvert        ─▶                     its result is ready, and it takes part with these keys
                 ◀─   SumRoster         who takes part
SumShares        ─▶                     shares of its secrets, for each neighbour
                 ◀─   SumShares         those for it; now it sends its masked result, as any result
                 ◀─   SumSurvivors      whose results are in the sum
SumSignature     ─▶                     it was told so
                 ◀─   SumSignatures     so were the others
SumRevealed      ─▶                     what takes off what is left of the masks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from choral.secagg.roster import Advert


@dataclass(frozen=True, slots=True)
class SumAdvert:
    """A client takes part."""

    assignment: str
    advert: Advert


@dataclass(frozen=True, slots=True)
class SumRoster:
    """Who takes part."""

    assignment: str
    adverts: tuple[Advert, ...]


@dataclass(frozen=True, slots=True)
class SumShares:
    """Sealed shares: by the client that they are for if a client says it, by the one that they are from if the coordinator does."""

    assignment: str
    sealed: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class SumSurvivors:
    """Whose masked results are in the sum."""

    assignment: str
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SumSignature:
    """A client was told who survives."""

    assignment: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class SumSignatures:
    """By client, that the others were told the same."""

    assignment: str
    signatures: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class SumRevealed:
    """Shares by whose secret it is: of those who survive of the seed of their own mask, of the others of their key's."""

    assignment: str
    mask_seeds: Mapping[str, int]
    key_seeds: Mapping[str, int]


FromSummand = SumAdvert | SumShares | SumSignature | SumRevealed
ToSummand = SumRoster | SumShares | SumSurvivors | SumSignatures

"""A client's secrets of one round, what it shows of them, and what two clients make of each other's.

    mask key     X25519, made from `key_seed`; with another client's it gives the key of the mask that cancels
    self mask    has a key made from `mask_seed`; of both seeds the others have shares
    share key    X25519; with another client's it gives the key under which shares travel through the coordinator

All keys are derived by HKDF-SHA256 (RFC 5869), each for one purpose in one session. `session` is the digest of the roster, which
has everybody's public keys: no other round has the same.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from choral.errors import InvalidMessage
from choral.secagg.masks import KEY_BYTES
from choral.secagg.shamir import NUMBER_BYTES, PRIME

_DOMAIN = b"choral secagg 1 "
_SHARE_KEY_BYTES = 32
_NONCE = bytes(12)  # a share key is for one message
PUBLIC_BYTES, SEALED_BYTES = 32, 80
_CURVE_PRIME = 2**255 - 19
_LOW_ORDER = frozenset(
    (
        0,
        1,
        _CURVE_PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
)
"""the points whose order divides 8: with them everybody agrees on the same"""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a client keeps for itself in one round; the seeds are numbers below 2^255 - 19."""

    mask_seed: int = field(repr=False)
    key_seed: int = field(repr=False)
    mask_key: X25519PrivateKey = field(repr=False)
    share_key: X25519PrivateKey = field(repr=False)

    def shown(self) -> Shown:
        """What the others see of it."""
        return Shown(_public(self.mask_key), _public(self.share_key), commitment(self.mask_seed))


@dataclass(frozen=True, slots=True)
class Shown:
    """A client's public keys of one round, 32 bytes each, and the commitment to its `mask_seed`."""

    mask_key: bytes
    share_key: bytes
    commitment: bytes


def fresh() -> Secrets:
    """Secrets that nobody has had before."""
    key_seed = secrets.randbelow(PRIME)
    return Secrets(secrets.randbelow(PRIME), key_seed, mask_key_of(key_seed), X25519PrivateKey.generate())


def mask_key_of(key_seed: int) -> X25519PrivateKey:
    """The mask key that is made from a seed: its owner makes it, and the coordinator if that one drops out."""
    return X25519PrivateKey.from_private_bytes(_derived(_bytes(key_seed), b"mask key", PUBLIC_BYTES))


def commitment(mask_seed: int) -> bytes:
    """By which a recovered `mask_seed` is known to be right; says nothing of it, since no two seeds are likely to be tried."""
    return hashlib.sha256(_DOMAIN + b"commitment" + _bytes(mask_seed)).digest()


def is_key_seed(key_seed: int, shown: Shown) -> bool:
    """Whether a recovered seed is the one of the mask key that was shown."""
    return _public(mask_key_of(key_seed)) == shown.mask_key


def self_mask(mask_seed: int, session: bytes) -> bytes:
    """The key of a client's own mask."""
    return _derived(_bytes(mask_seed), b"self mask", KEY_BYTES, session)


def pair_mask(mine: X25519PrivateKey, theirs: bytes, session: bytes, pair: bytes) -> bytes:
    """The key of the mask that two clients have in common. Raises InvalidMessage: theirs is no key.

    `pair` says who they are, the same on both sides. Without it, whoever shows a key that is another's but for how it is written,
    or for a point of low order, would have that one's masks.
    """
    return _derived(_agreed(mine, theirs), b"pair mask" + pair, KEY_BYTES, session)


def check_shown(client: str, shown: Shown) -> None:
    """Raises InvalidMessage: these are no keys with which anybody can agree on a secret."""
    if {len(shown.mask_key), len(shown.share_key), len(shown.commitment)} != {PUBLIC_BYTES}:
        raise InvalidMessage(f"{client} shows keys of another length: each has {PUBLIC_BYTES} bytes")
    if _point(shown.mask_key) == _point(shown.share_key):
        raise InvalidMessage(f"{client} shows one key for two purposes")
    if not points(shown).isdisjoint(_LOW_ORDER):
        raise InvalidMessage(f"{client} shows what is no key: with it everybody would agree on the same secret")


def points(shown: Shown) -> frozenset[int]:
    """What its two keys are, however they are written."""
    return frozenset((_point(shown.mask_key), _point(shown.share_key)))


def _point(key: bytes) -> int:
    """The coordinate that X25519 takes from a key (RFC 7748, §5): without the highest bit, modulo the prime."""
    return (int.from_bytes(key, "little") & (2**255 - 1)) % _CURVE_PRIME


@dataclass(frozen=True, slots=True)
class Shares:
    """Of another client's secrets, what one holder has."""

    mask_seed: int = field(repr=False)
    key_seed: int = field(repr=False)


def seal(shares: Shares, mine: X25519PrivateKey, theirs: bytes, session: bytes, sender: str, receiver: str) -> bytes:
    """The shares, to be read by the receiver alone. Raises InvalidMessage: theirs is no key."""
    key, about = _share_key(mine, theirs, session, sender, receiver)
    return AESGCM(key).encrypt(_NONCE, _bytes(shares.mask_seed) + _bytes(shares.key_seed), about)


def unseal(sealed: bytes, mine: X25519PrivateKey, theirs: bytes, session: bytes, sender: str, receiver: str) -> Shares:
    """What the sender has sealed for this receiver in this session. Raises InvalidMessage: it is something else."""
    key, about = _share_key(mine, theirs, session, sender, receiver)
    try:
        plain = AESGCM(key).decrypt(_NONCE, sealed, about)
    except (InvalidTag, ValueError) as error:
        raise InvalidMessage(f"the shares from {sender} are not what it has sealed for {receiver} in this round") from error
    mask_seed, key_seed = int.from_bytes(plain[:NUMBER_BYTES], "big"), int.from_bytes(plain[NUMBER_BYTES:], "big")
    if len(plain) != 2 * NUMBER_BYTES or max(mask_seed, key_seed) >= PRIME:
        raise InvalidMessage(f"the shares from {sender} are no two numbers below 2^255 - 19")
    return Shares(mask_seed, key_seed)


def _share_key(mine: X25519PrivateKey, theirs: bytes, session: bytes, sender: str, receiver: str) -> tuple[bytes, bytes]:
    """The key for what this sender tells this receiver, and what the message is bound to."""
    about = b"".join(len(name.encode()).to_bytes(2, "big") + name.encode() for name in (sender, receiver)) + session
    return _derived(_agreed(mine, theirs), b"shares" + about, _SHARE_KEY_BYTES, session), about


def _agreed(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:  # another length, or a point with which everybody agrees on the same
        raise InvalidMessage(f"{theirs[:PUBLIC_BYTES].hex()} is no X25519 key to agree with") from error


def _derived(secret: bytes, purpose: bytes, length: int, session: bytes = b"") -> bytes:
    return HKDF(SHA256(), length, salt=session or None, info=_DOMAIN + purpose).derive(secret)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _bytes(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "big")

"""The key by which other clients know this device, whatever the coordinator says, and what certifies it: files of its own."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from choral import identity
from choral.durable import make_folder_durably, write_durably
from choral.errors import TrustError
from choral.fingerprint import shown_fingerprint
from choral.secagg.roster import Signer
from choral.voucher import Voucher
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from choral_client.keys import make_key, private_key


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A device's long-term Ed25519 key; what is in `state` decides which it is, and nothing else.

    An enrolled device has it in its identity; any other in the state folder itself, and if it enrols one day, it takes it along. A
    voucher in the state folder is its owner's, from an authority elsewhere, and wins over that of the coordinator's authority,
    which lies in the identity: enrolling replaces that folder, renewal that file, and neither touches the owner's.
    """

    state: Path
    private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def of(cls, state: Path) -> Self:
        """The device's key, made and kept if there is none. Raises TrustError: it cannot be read or written."""
        enrolled, own = state / identity.FOLDER / identity.SIGNING_KEY, state / identity.SIGNING_KEY
        path = enrolled if enrolled.exists() else own
        try:
            make_folder_durably(state)
            with suppress(FileExistsError):
                make_key(path, Ed25519PrivateKey.generate())
        except OSError as error:
            raise TrustError(f"{path} cannot be written ({error.strerror}): give a --state that this user may write") from error
        key = private_key(path)
        if not isinstance(key, Ed25519PrivateKey):
            raise TrustError(f"{path} holds a key of another kind: an Ed25519 key signs; put it back, or remove the file")
        return cls(state, key)

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self.private.public_key().public_bytes_raw()

    def signer(self, name: str) -> Signer:
        """What signs for the client of that name. The voucher is read anew: renewal may have brought another.

        Raises TrustError: the owner's voucher is for another client or key, or a file is damaged.
        """
        return Signer(self.private.sign, self.public, self._voucher(name))

    def keep(self, voucher: Voucher) -> Path:
        """Put an owner's voucher in its place, which is returned. Raises TrustError: it is for another key; OSError."""
        place = self.state / identity.VOUCHER
        self._must_be_ours(voucher, "the voucher")
        write_durably(place, str(voucher).encode())
        return place

    def _voucher(self, name: str) -> bytes:
        owners, issued = self.state / identity.VOUCHER, self.state / identity.FOLDER / identity.VOUCHER
        if (voucher := _voucher_in(owners)) is not None:
            self._must_be_ours(voucher, str(owners))
            if voucher.name != name:
                raise TrustError(f"{owners} is for {voucher.name}, and this client is {name}: ask its authority for another")
            return voucher.signature
        voucher = _voucher_in(issued)
        if voucher is None or (voucher.name, voucher.key) != (name, self.public):
            return b""  # a client that is not what its folder once enrolled as
        return voucher.signature

    def _must_be_ours(self, voucher: Voucher, told: str) -> None:
        if voucher.key != self.public:
            raise TrustError(
                f"{told} is for a key with the fingerprint {shown_fingerprint(voucher.key)}, and this device's has "
                f"{shown_fingerprint(self.public)}: ask the authority for another, or remove the file"
            )


def _voucher_in(path: Path) -> Voucher | None:
    try:
        return Voucher.parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"{path} cannot be read ({error.strerror}): let this user read it") from error

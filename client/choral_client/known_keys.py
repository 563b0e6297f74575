"""Which signing keys this client takes for whose: its owner's word first, then an authority's, and never the coordinator's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from choral import voucher
from choral.errors import Deceived, Declined, TrustError
from choral.fingerprint import fingerprint
from choral.identity import certificates
from choral.secagg.roster import Advert

from choral_client.guard_file import GuardFile


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """Of the others in a secure sum. `client` is this one, with its own `key`; `ca`, PEM, is what it trusts for TLS, if it does.

    The guard is asked each time, so that what its owner changes holds from the next round on.
    """

    client: str
    key: bytes
    guard: GuardFile
    ca: bytes | None = None
    now: Callable[[], datetime] = _now

    def vouch(self, said: Advert) -> None:
        """A `choral.secagg.roster.Vouch`. Raises Deceived: the key is not known as its client's; Declined: the guard is broken."""
        if said.client == self.client:
            if said.key != self.key:
                raise Deceived(f"the coordinator shows a signing key as that of this client, {self.client}, which is another's")
            return
        guard = self.guard.current()
        if guard.clients is not None:
            _check_pinned(said, guard.clients)
            return
        voucher.check(said.voucher, said.client, said.key, self._authorities(said.client, guard.authority), self.now())

    def _authorities(self, other: str, path: Path | None) -> bytes:
        """The certificates of whoever certifies signing keys, PEM."""
        if path is not None:
            try:
                return certificates(path)
            except TrustError as error:
                raise Declined(f"this device's guard cannot be used, so nothing is done: authority: {error}") from error
        if self.ca is None:
            raise Deceived(
                f"nobody tells this device which signing key is that of {other}: pin its fingerprint in the guard (clients), or "
                "name there who certifies signing keys (authority)"
            )
        return self.ca


def _check_pinned(said: Advert, pinned: dict[str, str]) -> None:
    if said.client not in pinned:
        raise Deceived(
            f"this device's guard does not allow a secure sum with {said.client}, which is not among those that it pins (clients): "
            f"add the fingerprint that `choral client fingerprint` prints on that device, or leave {said.client} out of the run"
        )
    if fingerprint(said.key) != pinned[said.client]:
        raise Deceived(
            f"{said.client} shows a signing key with the fingerprint {fingerprint(said.key)}, and this device's guard pins "
            f"{pinned[said.client]} (clients): if its owner says that it has a new key, pin that; if not, somebody poses as "
            f"{said.client}"
        )

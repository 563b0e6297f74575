"""Whose keys a device believes: pinned, certified, its own; and what the coordinator would have it believe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from choral.errors import Deceived, Declined
from choral.fingerprint import fingerprint, shown_fingerprint
from choral.secagg.keys import fresh
from choral.secagg.roster import Advert, Signer, Terms, advert, check_advert
from choral_client.guard_file import GuardFile
from choral_client.known_keys import KnownKeys
from choral_client.signing_key import SigningKey
from client.authorities import Authority

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
TERMS = Terms("run", 3, b"\x01" * 32, b"\x02" * 32)


def said(client: str, signer: Signer) -> Advert:
    return advert(TERMS, client, fresh().shown(), signer)


@dataclass
class Device:
    """Alice's, and Bob as she hears of him."""

    folder: Path
    alice: SigningKey
    bob: SigningKey
    coordinators: Authority
    elsewhere: Authority

    def guarded(self, text: str) -> None:
        (self.folder / "guard.yaml").write_text(text)

    def knows(self, plain: bool = False) -> KnownKeys:
        ca = None if plain else self.coordinators.certificate
        return KnownKeys("alice", self.alice.public, GuardFile(self.folder), ca, lambda: NOW)

    def bobs(self, authority: Authority | None, name: str = "bob") -> Advert:
        voucher = authority.vouch(name, self.bob.public) if authority is not None else b""
        return said("bob", replace(self.bob.signer("bob"), voucher=voucher))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    (tmp_path / "alice").mkdir()
    folders = tmp_path / "alice", tmp_path / "bob"
    return Device(folders[0], *map(SigningKey.of, folders), Authority.made(NOW), Authority.made(NOW))


def test_a_key_that_the_authority_of_tls_certifies_is_believed(device: Device) -> None:
    check_advert(TERMS, device.bobs(device.coordinators), device.knows().vouch)


def test_one_that_nobody_or_another_certifies_is_not(device: Device) -> None:
    known = device.knows()
    with pytest.raises(Deceived, match="nobody certifies the signing key of bob"):
        known.vouch(device.bobs(None))
    with pytest.raises(Deceived, match=r"the signing key of bob .* is not certified"):
        known.vouch(device.bobs(device.elsewhere))
    with pytest.raises(Deceived, match=r"the signing key of bob .* is not certified"):
        known.vouch(device.bobs(device.coordinators, "carol"))


def test_an_authority_elsewhere_takes_the_place_of_the_coordinators(device: Device) -> None:
    (device.folder / "their.pem").write_bytes(device.elsewhere.certificate)
    device.guarded("authority: their.pem")  # from the guard's folder, wherever the client was started
    known = device.knows()
    known.vouch(device.bobs(device.elsewhere))
    with pytest.raises(Deceived, match="is not certified by an authority that this device trusts"):
        known.vouch(device.bobs(device.coordinators))  # its operator holds that key


def test_an_authority_ends(device: Device) -> None:
    known = replace(device.knows(), now=lambda: NOW + timedelta(days=2))
    with pytest.raises(Deceived, match="valid on 2026-11-27"):
        known.vouch(device.bobs(device.coordinators))


def test_in_plain_text_nobody_is_believed_unless_pinned_or_certified(device: Device) -> None:
    known = device.knows(plain=True)
    with pytest.raises(Deceived, match=r"which signing key is that of bob: pin its fingerprint in the guard \(clients\), or name"):
        known.vouch(device.bobs(device.coordinators))
    device.guarded(f"clients: {{bob: {fingerprint(device.bob.public)}}}")
    known.vouch(device.bobs(None))


def test_a_pinned_client_needs_exactly_that_key_and_no_voucher(device: Device) -> None:
    device.guarded(f"clients: {{bob: '{shown_fingerprint(device.bob.public)}'}}")
    known = device.knows()
    known.vouch(device.bobs(None))
    other = SigningKey.of(device.folder.parent / "other")
    voucher = device.coordinators.vouch("bob", other.public)  # as a coordinator can that holds the authority's key
    with pytest.raises(Deceived, match=f"bob shows a signing key with the fingerprint {fingerprint(other.public)}.*poses as bob"):
        known.vouch(said("bob", replace(other.signer("bob"), voucher=voucher)))


def test_whoever_is_not_pinned_is_not_accepted_however_certified(device: Device) -> None:
    device.guarded(f"clients: {{carol: {fingerprint(device.bob.public)}}}")
    with pytest.raises(Deceived, match=r"a secure sum with bob, which is not among those that it pins \(clients\): add the"):
        device.knows().vouch(device.bobs(device.coordinators))


def test_it_knows_itself_and_nobody_else_by_its_name(device: Device) -> None:
    device.guarded("clients: {}")
    known = device.knows(plain=True)
    known.vouch(said("alice", device.alice.signer("alice")))
    stolen = replace(device.bob.signer("alice"), voucher=device.coordinators.vouch("alice", device.bob.public))
    for one in (known, device.knows()):
        with pytest.raises(Deceived, match="a signing key as that of this client, alice, which is another's"):
            one.vouch(said("alice", stolen))


def test_what_its_owner_changes_counts_at_once(device: Device) -> None:
    known, bobs = device.knows(), device.bobs(device.coordinators)
    known.vouch(bobs)
    device.guarded("clients: {}")
    with pytest.raises(Deceived, match="does not allow a secure sum with bob"):
        known.vouch(bobs)
    device.guarded(f"clients: {{bob: {fingerprint(device.bob.public)}}}")
    known.vouch(bobs)
    device.guarded("clients: {bob: nonsense}")
    with pytest.raises(Declined, match=r"cannot be used, so nothing is done: .*a fingerprint is 64 hexadecimal digits"):
        known.vouch(bobs)


def test_an_authority_whose_file_has_gone_certifies_nobody(device: Device) -> None:
    (device.folder / "their.pem").write_bytes(device.elsewhere.certificate)
    device.guarded("authority: their.pem")
    known = device.knows()
    for spoil in ((device.folder / "their.pem").unlink, lambda: (device.folder / "their.pem").write_text("nonsense")):
        spoil()
        with pytest.raises(Declined, match=r"nothing is done: authority: .*their\.pem"):
            known.vouch(device.bobs(device.coordinators))

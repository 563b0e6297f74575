from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from choral.errors import TrustError
from choral.identity import FOLDER, NEW, held, read_identity
from choral_server.trust import Authority, make_authority
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    make_authority(tmp_path / "ca", ["localhost"])
    return tmp_path / "ca"


def enrolled(authority: Path, folder: Path) -> bytes:
    """What an enrolment leaves in `folder`; the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    signing = Authority.load(authority / "ca.pem", authority / "ca.key")
    made = signing.certify(key.public_key(), "alice", "device", 3600.0, datetime.now(UTC))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    folder.mkdir(parents=True)
    (folder / "ca.pem").write_bytes((authority / "ca.pem").read_bytes())
    (folder / "tls.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "tls.key").write_bytes(private)
    (folder / "about.json").write_text(json.dumps({"name": "alice", "role": "device", "server": "localhost:8470"}))
    return private


def test_nobody_has_enrolled(tmp_path: Path) -> None:
    assert held(tmp_path) is None


def test_an_identity_that_was_got_before_a_crash_takes_the_place_of_the_old(authority: Path, tmp_path: Path) -> None:
    enrolled(authority, tmp_path / FOLDER)
    newer = enrolled(authority, tmp_path / NEW)
    known = held(tmp_path)
    assert known is not None
    assert known.credentials.key == newer
    assert read_identity(tmp_path / FOLDER).credentials.key == newer
    assert not (tmp_path / NEW).exists()


def test_one_that_is_not_whole_leaves_the_old_in_its_place(authority: Path, tmp_path: Path) -> None:
    older = enrolled(authority, tmp_path / FOLDER)
    enrolled(authority, tmp_path / NEW)
    (tmp_path / NEW / "tls.pem").write_text("half of")
    known = held(tmp_path)
    assert known is not None
    assert known.credentials.key == older


def test_a_key_of_another_certificate_is_named(authority: Path, tmp_path: Path) -> None:
    enrolled(authority, tmp_path / FOLDER)
    (tmp_path / FOLDER / "tls.key").write_bytes(enrolled(authority, tmp_path / "other"))
    with pytest.raises(TrustError, match=r"tls\.key is not the key of .*tls\.pem"):
        held(tmp_path)

"""An authority that runs elsewhere, and devices that it certifies: with the commands that their owners would use."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from choral.fingerprint import fingerprint, parse_key
from choral_client.signing_key import SigningKey

CLI = [sys.executable, "-m", "choral_deploy.cli"]


def run(*arguments: object, folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, cwd=folder, timeout=120, input=text)


def rows(printed: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in printed.splitlines())


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    made = run("authority", "init", "pki", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "choral authority certify NAME KEY --authority pki" in made.stdout
    return tmp_path / "pki"


def test_a_key_is_made_shown_and_certified_by_an_authority_elsewhere(tmp_path: Path, authority: Path) -> None:
    shown = run("client", "fingerprint", "--name", "alice", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    told, state = rows(shown.stdout), tmp_path / "choral-alice"
    key = SigningKey.of(state)
    assert told == {"name": "alice", "fingerprint": f"sha256:{fingerprint(key.public)}", "key": f"ed25519:{key.public.hex()}"}
    assert stat.S_IMODE((state / "signing.key").stat().st_mode) == 0o600
    assert rows(run("client", "fingerprint", "--state", state, folder=tmp_path).stdout)["key"] == told["key"]

    certified = run("authority", "certify", "alice", told["key"], "--authority", authority, folder=tmp_path)
    assert certified.returncode == 0, certified.stderr
    assert told["fingerprint"] in certified.stderr  # to be compared
    (tmp_path / "alice.voucher").write_text(certified.stdout)

    (state / "guard.yaml").write_text("authority: ../pki/ca.pem")
    kept = run("client", "voucher", "alice.voucher", "--name", "alice", folder=tmp_path)
    assert kept.returncode == 0, kept.stderr
    assert "says that this device is alice; certified by" in kept.stdout
    assert len(key.signer("alice").voucher) > 64


def test_vouchers_that_a_device_does_not_take(tmp_path: Path, authority: Path) -> None:
    key = SigningKey.of(tmp_path / "state")
    assert run("authority", "init", "other", folder=tmp_path).returncode == 0
    for file, name, public, by in (
        ("good", "alice", key.public.hex(), "pki"),
        ("key", "alice", "ab" * 32, "pki"),
        ("authority", "alice", f"ed25519:{key.public.hex()}", "other"),
    ):
        (tmp_path / file).write_text(run("authority", "certify", name, public, "--authority", by, folder=tmp_path).stdout)
    (tmp_path / "nonsense").write_text("nonsense")
    trusted = ("--authority", authority / "ca.pem")
    for arguments, code, told in (
        (("missing",), 6, "missing cannot be read"),
        (("nonsense",), 6, "nonsense holds no voucher"),
        (("good", "--name", "bob"), 2, "good is for alice, and this client is bob"),
        (("key",), 6, "the voucher is for a key with the fingerprint"),
        (("authority", *trusted), 6, "authority is not by the authority in"),
        (("good", "--authority", "nonsense"), 6, "nonsense holds no certificate in PEM form"),
    ):
        refused = run("client", "voucher", *arguments, "--state", "state", folder=tmp_path)
        assert (refused.returncode, told in refused.stderr) == (code, True), refused.stderr
        assert not (tmp_path / "state" / "signing.voucher").exists()
    unchecked = run("client", "voucher", "good", "--state", "state", folder=tmp_path)
    assert (unchecked.returncode, "its signature unchecked" in unchecked.stdout) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("al/ice", "ab" * 32, "--authority", "pki"), "name 'al/ice' is not allowed"),
        (("alice", "sha256:" + "ab" * 32, "--authority", "pki"), "this is a fingerprint, which does not hold the key"),
        (("alice", "ab", "--authority", "pki"), "a signing key is 64 hexadecimal digits"),
        (("alice", "@missing", "--authority", "pki"), "give the file that holds the key"),
        (("alice", "ab" * 32, "--authority", "none"), "none holds no authority: `choral authority init none` makes one"),
    ],
)
def test_what_is_not_certified(tmp_path: Path, authority: Path, arguments: tuple[str, ...], told: str) -> None:
    refused = run("authority", "certify", *arguments, folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert told in refused.stderr


def test_an_authority_is_not_overwritten(tmp_path: Path, authority: Path) -> None:
    before = (authority / "ca.key").read_bytes()
    again = run("authority", "init", "pki", folder=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (6, True)
    assert (authority / "ca.key").read_bytes() == before


def test_a_key_from_a_file_and_a_client_that_is_not_named(tmp_path: Path, authority: Path) -> None:
    key = SigningKey.of(tmp_path / "state").public
    (tmp_path / "key").write_text(f"{key.hex()}\n")
    assert run("authority", "certify", "alice", "@key", "--authority", "pki", folder=tmp_path).returncode == 0
    shown = rows(run("client", "fingerprint", "--state", "state", folder=tmp_path).stdout)
    assert (shown.keys(), parse_key(shown["key"])) == ({"fingerprint", "key"}, key)
    nobody = run("client", "fingerprint", folder=tmp_path)
    assert (nobody.returncode, "give --name, or --state" in nobody.stderr) == (2, True)

from __future__ import annotations

import base64
import ipaddress
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from choral.errors import Deceived, TrustError
from choral.status import from_rpc
from choral.voucher import check
from choral_server.trust import Authority, certificate_in, key_in, make_authority, make_voucher_authority
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

FILES = ["ca.key", "ca.pem", "server.key", "server.pem"]
NOW = datetime.now(UTC)
P256, EC_KEY = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d0201")
SERVING = health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def _served(folder: Path) -> AsyncIterator[int]:
    """A real server that shows the folder's certificate; gives its port."""
    server = grpc.aio.server()
    healthy = health.aio.HealthServicer()
    await healthy.set("", SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def _asked(address: str, ca: bytes) -> int:
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
        request = health_pb2.HealthCheckRequest()
        return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)).status  # type: ignore[no-any-return]


async def _refusal(address: str, ca: bytes) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await _asked(address, ca)
    return from_rpc(raised.value, address)


@pytest.mark.parametrize(
    ("hosts", "called"), [(["127.0.0.1"], "127.0.0.1"), (["coordinator.example.org", "localhost"], "localhost")]
)
async def test_a_client_with_the_ca_connects_by_any_of_the_hosts(tmp_path: Path, hosts: list[str], called: str) -> None:
    make_authority(tmp_path, hosts)
    async with _served(tmp_path) as port:
        assert await _asked(f"{called}:{port}", (tmp_path / "ca.pem").read_bytes()) == SERVING


async def test_a_client_with_another_ca_refuses_the_coordinator(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        make_authority(tmp_path / name, ["127.0.0.1"])
    async with _served(tmp_path / "ours") as port:
        error = await _refusal(f"127.0.0.1:{port}", (tmp_path / "theirs" / "ca.pem").read_bytes())
    assert type(error) is TrustError
    assert "shows a certificate that the given CA did not sign for that name" in str(error)


async def test_a_client_refuses_a_name_that_the_certificate_does_not_have(tmp_path: Path) -> None:
    make_authority(tmp_path, ["coordinator.example.org", "10.0.0.5"])
    async with _served(tmp_path) as port:
        error = await _refusal(f"127.0.0.1:{port}", (tmp_path / "ca.pem").read_bytes())
    assert type(error) is TrustError
    assert "use an address that was given to `choral server init` with --host" in str(error)


def test_names_and_addresses_are_in_the_certificate(tmp_path: Path) -> None:
    make_authority(tmp_path, ["coordinator.example.org", "localhost", "10.0.0.5", "::1"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.5"), ipaddress.ip_address("::1")]


def test_only_the_authority_may_sign(tmp_path: Path) -> None:
    make_authority(tmp_path, ["localhost"])
    authority, server = (x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.pem", "server.pem"))
    server.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for certificate, key_file in ((authority, "ca.key"), (server, "server.key")):
        key = load_pem_private_key((tmp_path / key_file).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.public_key() == certificate.public_key()


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    make_authority(tmp_path / "deep" / "tls", ["localhost"])
    assert sorted(path.name for path in (tmp_path / "deep/tls").iterdir()) == FILES
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / "deep/tls" / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("existing", FILES)
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(TrustError, match="exists already: choose another folder") as refused:
        make_authority(tmp_path, ["localhost"])
    assert str(refused.value).startswith(f"{tmp_path / existing} ")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(existing, b"precious")]


@pytest.mark.parametrize("host", ["köln.example.org", "two words", "10.0.0.5:8470", "https://coordinator", ""])
def test_a_host_that_is_neither_name_nor_address_is_refused_and_nothing_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(TrustError, match="is neither an IP address nor a DNS name") as refused:
        make_authority(tmp_path / "tls", ["localhost", host])
    assert repr(host) in str(refused.value)
    assert not (tmp_path / "tls").exists() or list((tmp_path / "tls").iterdir()) == []


def test_each_authority_has_keys_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_authority(tmp_path / name, ["localhost"])
    keys = {(tmp_path / name / file).read_bytes() for name in ("a", "b") for file in ("ca.key", "server.key")}
    assert len(keys) == 4


def test_an_authority_of_signing_keys_has_a_key_and_a_certificate_only(tmp_path: Path) -> None:
    make_voucher_authority(tmp_path / "deep" / "authority")
    folder = tmp_path / "deep" / "authority"
    assert sorted(path.name for path in folder.iterdir()) == ["ca.key", "ca.pem"]
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600
    before = (folder / "ca.key").read_bytes()
    with pytest.raises(TrustError, match="exists already: choose another folder"):
        make_voucher_authority(folder)
    assert (folder / "ca.key").read_bytes() == before


@pytest.mark.parametrize("kind", ["EC", "RSA"])
def test_an_authority_vouches_for_a_name_and_a_key(tmp_path: Path, kind: str) -> None:
    make_voucher_authority(tmp_path)
    authority, now = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key"), datetime.now(UTC)
    if kind == "RSA":  # as somebody's own PKI may have
        key = rsa.generate_private_key(65537, 2048)
        made = authority.certify(key.public_key(), "authority", "device", 3600.0, now)
        authority = Authority(made, key)  # type: ignore[arg-type]
    ca = authority.certificate.public_bytes(Encoding.PEM)
    voucher = authority.vouch("alice", bytes(32))
    check(voucher, "alice", bytes(32), ca, now)
    for name, signing_key in (("bob", bytes(32)), ("alice", bytes([1] * 32))):
        with pytest.raises(Deceived):
            check(voucher, name, signing_key, ca, now)


async def test_a_coordinator_without_tls_is_not_said_to_show_a_wrong_certificate(tmp_path: Path) -> None:
    make_authority(tmp_path, ["127.0.0.1"])
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    error = await _refusal(f"127.0.0.1:{port}", (tmp_path / "ca.pem").read_bytes())
    await server.stop(None)
    assert "shows a certificate" not in str(error)


def test_the_servers_certificate_is_renewed_when_it_is_about_to_expire(tmp_path: Path) -> None:
    make_authority(tmp_path, ["localhost", "10.0.0.5"])
    authority = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    files = tmp_path / "server.pem", tmp_path / "server.key"
    before = x509.load_pem_x509_certificate(files[0].read_bytes())
    assert not authority.renew_server(*files, before.not_valid_after_utc - timedelta(days=31))
    assert x509.load_pem_x509_certificate(files[0].read_bytes()) == before
    assert authority.renew_server(*files, before.not_valid_after_utc - timedelta(days=29))
    after = x509.load_pem_x509_certificate(files[0].read_bytes())
    assert after != before
    assert after.public_key() == before.public_key()
    names = x509.SubjectAlternativeName
    assert after.extensions.get_extension_for_class(names) == before.extensions.get_extension_for_class(names)
    after.verify_directly_issued_by(authority.certificate)


def test_a_certificate_of_another_authority_is_not_ours_to_renew(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        make_authority(tmp_path / name, ["localhost"])
    theirs = tmp_path / "theirs" / "server.pem"
    own = Authority.load(tmp_path / "ours" / "ca.pem", tmp_path / "ours" / "ca.key")
    other = x509.load_pem_x509_certificate(theirs.read_bytes())
    renamed = own.certificate.subject.rfc4514_string()
    assert other.issuer.rfc4514_string() == renamed  # all authorities of `init` have one name: the signature tells them apart
    with pytest.raises(TrustError, match="is not signed by"):
        own.renew_server(theirs, tmp_path / "theirs" / "server.key", other.not_valid_after_utc)


def test_a_certificate_that_names_no_host_cannot_be_renewed(tmp_path: Path) -> None:
    make_authority(tmp_path, ["localhost"])
    authority = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    nameless = authority.certify(key_in(tmp_path / "server.key").public_key(), "x", "device", 60.0, NOW)
    (tmp_path / "server.pem").write_bytes(nameless.public_bytes(Encoding.PEM))
    with pytest.raises(TrustError, match="names no host: make another"):
        authority.renew_server(tmp_path / "server.pem", tmp_path / "server.key", NOW)


@pytest.mark.parametrize(
    ("old", "new"), [(P256, P256[:-1] + b"c"), (EC_KEY, EC_KEY[:-1] + b"c"), (b"\x02\x01\x02", b"\x02\x01\x07")]
)
def test_what_no_release_can_read_is_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    """A curve, a kind of key and a version of certificates that do not exist."""
    make_authority(tmp_path, ["localhost"])
    certificate = certificate_in(tmp_path / "ca.pem").public_bytes(Encoding.DER)
    key = key_in(tmp_path / "ca.key").private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    pem = "-----BEGIN PRIVATE KEY-----\n{}-----END PRIVATE KEY-----\n"
    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(certificate.replace(old, new)))
    with pytest.raises(TrustError, match=r"is not the key of|holds no certificate"):
        Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    if old in key:
        (tmp_path / "ca.key").write_text(pem.format(base64.encodebytes(key.replace(old, new)).decode()))
        with pytest.raises(TrustError, match="holds no private key"):
            key_in(tmp_path / "ca.key")


def test_what_is_no_key_or_certificate_is_named(tmp_path: Path) -> None:
    make_authority(tmp_path, ["localhost"])
    make_authority(tmp_path / "other", ["localhost"])
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nothing")
    for call, told in (
        (lambda: certificate_in(nonsense), "holds no certificate in PEM form"),
        (lambda: certificate_in(tmp_path / "gone"), "cannot be read"),
        (lambda: key_in(nonsense), "holds no private key in PEM form"),
        (lambda: Authority.load(tmp_path / "ca.pem", tmp_path / "other" / "ca.key"), "is not the key of"),
    ):
        with pytest.raises(TrustError, match=told):
            call()

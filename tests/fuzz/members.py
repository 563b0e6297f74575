"""Who belongs: tokens, enrolment on both sides, certificates, and the files that hold identities."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from choral.address import HostPort
from choral.config import parse
from choral.errors import Deceived, Revoked, TrustError, Unauthenticated
from choral.identity import ABOUT, AUTHORITY, CERTIFICATE, FOLDER, KEY, SIGNING_KEY, VOUCHER, read_credentials, read_identity
from choral.names import is_name
from choral.token import SECRET_BYTES, Token, digest_of
from choral.v1 import enrolment_pb2 as pb
from choral.voucher import Voucher, check, sign
from choral_client import enrolment
from choral_client.config import folder_of
from choral_client.signing_key import SigningKey
from choral_server.caller import CALLER, Role
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.doors import _credentials
from choral_server.enrolment_service import EnrolmentService
from choral_server.lease import Lease
from choral_server.membership import PROOF, Membership, key_digest
from choral_server.records import MemberRecord, TokenRecord
from choral_server.store import Store
from choral_server.troubles import Troubles
from choral_server.trust import Authority, make_authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from fuzz.house import CLIENT, CONFIG, SIGNS, Aborted, Call, loop
from fuzz.network import TOLD
from fuzz.target import Decode, Make, Target, framed, in_memory, pieces_of
from google.protobuf.message import DecodeError

SECRET = bytes(range(SECRET_BYTES))
NEWCOMER = "bob"
SERVER = HostPort("127.0.0.1", 8470)
KEYS: dict[str, Any] = {"alice": ec.derive_private_key(7, ec.SECP256R1()), "bob": ec.derive_private_key(8, ec.SECP256R1())}
DER = (
    b"\x30\x80",
    b"\x30\x84\xff\xff\xff\xff",
    b"\x06\x03\x55\x04\x03",
    b"\x0c\x05alice",
    b"\x02\x01\x00",
    b"\x05\x00",
    b"\x17\x0d",
)
PEM = (
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----END CERTIFICATE-----\n",
    b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n",
    b"\n\n",
    b"====",
)


# Tokens


def token(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        read = Token.parse(text)
    except TrustError as error:
        _check_silent(str(error), text.strip())
        raise
    assert is_name(read.name)
    assert folder_of(read.name).parent == Path()
    assert 0 <= read.port < 65536
    assert len(read.secret) == SECRET_BYTES
    assert Token.parse(str(read)) == read
    assert repr(read.secret) not in repr(read)


def _check_silent(told: str, text: str) -> None:
    """Nothing of the token is told, unless it is as short as a word."""
    parts = [text[at : at + 12] for at in range(7, len(text) - 12, 12)]
    assert not any(part in told for part in parts if len(set(part)) > 3), "the error repeats the token"


def signed_token(data: bytes) -> None:
    """One that is whole: everything behind its mark, with the right checksum."""
    import base64
    import zlib

    content = data + zlib.crc32(data).to_bytes(4, "big")
    token(b"choral-" + base64.urlsafe_b64encode(content).rstrip(b"="))


def _token_content(name: str) -> bytes:
    return b"\x01\x21\x17" + bytes(32) + SECRET + name.encode()


def token_seeds() -> list[bytes]:
    return [str(Token(name, 8471, bytes(range(32)), SECRET)).encode() for name in ("alice", "b" * 64)]


TOKEN_HOSTILE = [
    b"choral-",
    b"choral-" + b"A" * 1017,
    b"choral-\xed\xa0\x80",
    b"choral-AAAA\xff",
    "choral-é".encode(),
    b" choral-=====",
]


# At the coordinator


@cache
def authority() -> Authority:
    with tempfile.TemporaryDirectory() as folder:
        make_authority(Path(folder), ["localhost"])
        return Authority.load(Path(folder) / "ca.pem", Path(folder) / "ca.key")


def request(key: Any, name: str = NEWCOMER, algorithm: Any = hashes.SHA256()) -> bytes:  # noqa: B008
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm).public_bytes(Encoding.DER)


def certificate(key: Any, name: str, public_key: Any = None, days: float = 365.0) -> bytes:
    """PEM of one that somebody signed."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    began = datetime(2025, 1, 1, tzinfo=UTC)
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(public_key or key.public_key())
    built = built.serial_number(7).not_valid_before(began).not_valid_after(began + timedelta(days=days))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return built.sign(key, algorithm).public_bytes(Encoding.PEM)


def _now() -> datetime:
    return datetime(2025, 6, 1, tzinfo=UTC)


class Registry:
    """Alice has enrolled; Bob has a token."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.membership = Membership(store, authority(), 3600.0, _now)
        self.service = EnrolmentService(self.membership)

    @classmethod
    async def open(cls) -> Registry:
        database = await Database.open("sqlite://", Troubles())
        store = await Store.open(database, await Lease.take(database, "here", 36_000.0), SIGNS)
        alice = MemberRecord(CLIENT, Role.DEVICE, key_digest(KEYS[CLIENT].public_key()), bytes(32), _now(), _now())
        bob = TokenRecord(digest_of(SECRET), NEWCOMER, Role.DEVICE, _now() + timedelta(days=1), False)
        await store.commit(alice, bob)
        return cls(store)

    async def enrol(self, data: bytes) -> None:
        before = dict(self.store.members)
        answer = await self.service.Enrol(pb.EnrolRequest.FromString(data), Call())  # type: ignore[arg-type]
        self._check(answer.certificate, NEWCOMER)
        assert (answer.name, answer.role) == (NEWCOMER, "device")
        assert before.items() <= self.store.members.items() or set(self.store.members) == {CLIENT, NEWCOMER}
        assert self.store.members[CLIENT] == before[CLIENT]

    async def renew(self, data: bytes) -> None:
        """As the gate lets her in."""
        shown, asked = [*pieces_of(data), b"", b""][:2]
        CALLER.set(self.membership.identify(shown))
        answer = await self.service.Renew(pb.RenewRequest.FromString(asked), Call())  # type: ignore[arg-type]
        self._check(answer.certificate, CLIENT)
        made = x509.load_der_x509_certificate(answer.certificate)
        assert made.public_key() == KEYS[CLIENT].public_key()

    async def identify(self, data: bytes) -> None:
        caller = self.membership.identify(data)
        assert caller == self.membership.identify(data)
        assert (caller.name, caller.role, caller.certified) == (CLIENT, Role.DEVICE, True)

    def _check(self, made: bytes, name: str) -> None:
        read = x509.load_der_x509_certificate(made)
        read.verify_directly_issued_by(authority().certificate)
        assert [one.value for one in read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [name]
        assert not read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def at_registry(decode: Callable[[Registry, bytes], Any]) -> Make:
    @contextmanager
    def make(folder: Path) -> Iterator[Decode]:
        with loop() as runner:
            registry = runner.run(Registry.open())
            yield lambda data: runner.run(decode(registry, data))
            runner.run(registry.store._database.close())

    return make


_SIGNING = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))


def asked(signed: bytes, secret: bytes = SECRET) -> bytes:
    """A request to enrol in which the signing key has signed whatever is asked for."""
    own = {"signing_key": _SIGNING.public_key().public_bytes_raw(), "signature": _SIGNING.sign(PROOF + signed)}
    return pb.EnrolRequest(secret=secret, signing_request=signed, **own).SerializeToString()


async def signed_request(registry: Registry, data: bytes) -> None:
    await registry.enrol(asked(data))


@cache
def strange_keys() -> list[Any]:
    return [
        ec.derive_private_key(7, ec.SECP384R1()),
        ec.derive_private_key(7, ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)),
        rsa.generate_private_key(65537, 2048),
        dsa.generate_private_key(1024),
    ]


@cache
def requests_hostile() -> list[bytes]:
    """For keys of other kinds, of another version, with a signature that is none or of no known kind, and names by the yard."""
    good = request(KEYS[NEWCOMER])
    others = [
        request(key, algorithm=None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()) for key in strange_keys()
    ]
    named = [request(KEYS[NEWCOMER], name) for name in ("../../escaped", "x" * 64, "\u202e", "alice")]
    return [*others, *named, *_damaged(good), good + b"\0", good * 40]


def _damaged(der: bytes) -> list[bytes]:
    """Versions that do not exist, curves and signatures that nobody knows, points that are on no curve."""
    versions = [der.replace(b"\x02\x01" + bytes([old]), b"\x02\x01\x07", 1) for old in (0, 2) if b"\x02\x01" + bytes([old]) in der]
    curve, ecdsa, kind = b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2a\x86\x48\xce\x3d\x04\x03\x02", b"\x2a\x86\x48\xce\x3d\x02\x01"
    others = [der.replace(old, old[:-1] + b"\x63") for old in (curve, ecdsa, kind)]
    at = der.find(b"\x03\x42\x00\x04") + 4
    return [*versions, *others, der[:at] + bytes(64) + der[at + 64 :], der[:at] + b"\xff" * 64 + der[at + 64 :], b"\x30\x00"]


def enrolment_hostile() -> list[bytes]:
    good = pb.EnrolRequest.FromString(asked(request(KEYS[NEWCOMER])))
    seeds = [asked(request(KEYS[CLIENT])), asked(request(KEYS[NEWCOMER]), b""), asked(request(KEYS[NEWCOMER]), SECRET * 1000)]
    for field, values in {
        "signing_key": (b"", bytes(32), b"\xff" * 32, bytes(33)),
        "signature": (b"", bytes(64), bytes(10_000)),
    }.items():
        for value in values:
            changed = pb.EnrolRequest.FromString(good.SerializeToString())
            setattr(changed, field, value)
            seeds.append(changed.SerializeToString())
    return seeds


def renewal(signed: bytes, shown: bytes) -> bytes:
    return framed([shown, pb.RenewRequest(signing_request=signed).SerializeToString()])


def renewal_seeds() -> list[bytes]:
    return [renewal(request(KEYS[CLIENT], CLIENT), certificate(KEYS[CLIENT], CLIENT))]


def renewal_hostile() -> list[bytes]:
    shown = certificate(KEYS[CLIENT], CLIENT)
    return [renewal(one, shown) for one in requests_hostile()]


@cache
def certificates_hostile() -> list[bytes]:
    """Names that are none, keys that are unknown, times that are out of all bounds."""
    der = x509.load_pem_x509_certificate(certificate(KEYS[CLIENT], CLIENT)).public_bytes(Encoding.DER)
    names = [certificate(KEYS[CLIENT], name) for name in ("../..", "\u202e", "x" * 64, "mallory", NEWCOMER)]
    keys = [certificate(KEYS[CLIENT], CLIENT, key.public_key()) for key in strange_keys()]
    times = [der.replace(b"260101000000Z", old) for old in (b"261399000000Z", b"2601010000000", b"\xff" * 13)]
    times.append(certificate(KEYS[CLIENT], CLIENT, days=0.01))
    printable = [der.replace(b"\x0c\x05alice", kind + b"\x05alice") for kind in (b"\x1e", b"\x14", b"\x13", b"\x03")]
    return [*names, *keys, *times[3:], *map(_pem, [*_damaged(der), *times[:3], *printable]), b"", b"-----BEGIN CERTIFICATE-----"]


def _pem(der: bytes, what: str = "CERTIFICATE") -> bytes:
    import base64

    return f"-----BEGIN {what}-----\n".encode() + base64.encodebytes(der) + f"-----END {what}-----\n".encode()


# Files


def _private(key: Any, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    written: bytes = key.private_bytes(Encoding.PEM, form, NoEncryption())
    return written


@cache
def keys_hostile() -> list[bytes]:
    """Of every kind, in every form; of a curve that nobody knows."""
    keys = [_private(key) for key in strange_keys()]
    old = [
        _private(key, PrivateFormat.TraditionalOpenSSL) for key in strange_keys() if not isinstance(key, ed25519.Ed25519PrivateKey)
    ]
    der = KEYS[CLIENT].private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    curve, kind = b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2a\x86\x48\xce\x3d\x02\x01"
    strange = [_pem(der.replace(one, one[:-1] + b"\x63"), "PRIVATE KEY") for one in (curve, kind)]
    boxes = [_pem(der, what) for what in ("ENCRYPTED PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "RSA PRIVATE KEY")]
    return [*keys, *old, *strange, *boxes, _pem(der, "PRIVATE KEY") * 2, b""]


def _lasting(key: Any, name: str, public_key: Any = None) -> bytes:
    return certificate(key, name, public_key, days=365 * 60)


@contextmanager
def identity(folder: Path) -> Iterator[Decode]:
    """about.json, ca.pem, tls.pem and tls.key, in this order."""

    def decode(data: bytes) -> None:
        for name, piece in zip((ABOUT, AUTHORITY, CERTIFICATE, KEY), [*pieces_of(data), b"", b"", b"", b""], strict=False):
            (folder / name).write_bytes(piece)
        read_credentials(folder / AUTHORITY, folder / CERTIFICATE, folder / KEY)
        _check_identity(read_identity(folder))

    yield decode


def _check_identity(read: Any) -> None:
    assert is_name(read.name), "a name that nobody may have"
    assert read.credentials.expires_at > datetime.now(UTC)
    assert abs(read.credentials.lifetime_s) < 2**63
    assert read.credentials.key.decode("latin-1") not in repr(read)
    enrolment.tls(read.credentials)


def _about(**changes: Any) -> bytes:
    return json.dumps({"name": CLIENT, "role": "device", "server": "127.0.0.1:8470"} | changes).encode()


def _identity_with(
    about: bytes | None = None, ca: bytes | None = None, own: bytes | None = None, key: bytes | None = None
) -> bytes:
    good = _lasting(KEYS[CLIENT], CLIENT)
    given = zip((about, ca, own, key), (_about(), good, good, _private(KEYS[CLIENT])), strict=True)
    return framed([one if one is not None else usual for one, usual in given])


def identity_hostile() -> list[bytes]:
    changes: list[dict[str, Any]] = [
        *({"name": name} for name in ("../x", "", 5, None, ["a"], "\ud800", "x" * 5000)),
        *({"server": server} for server in (None, 5, {}, "x", "a:99999", "[::1]:1", "a:" + "9" * 5000)),
        *({"role": role} for role in (None, {}, "\n")),
    ]
    abouts = [*(_about(**change) for change in changes), b"[" * 100_000, b'{"name":' * 50_000, b"null", b"7", b"\xff"]
    files = [_identity_with(about=one) for one in abouts]
    files += [_identity_with(ca=one) for one in certificates_hostile()] + [
        _identity_with(own=one) for one in certificates_hostile()
    ]
    files += [_identity_with(key=one) for one in keys_hostile()]
    for key in strange_keys():
        files.append(_identity_with(own=_lasting(KEYS[CLIENT], CLIENT, key.public_key()), key=_private(key)))
    return files


@contextmanager
def tls_files(folder: Path) -> Iterator[Decode]:
    """The coordinator's ca.pem, ca.key, server.pem and server.key, in this order."""
    names = ("ca.pem", "ca.key", "server.pem", "server.key")
    paths = dict(zip(("ca", "ca_key", "certificate", "key"), (str(folder / name) for name in names), strict=True))
    config = parse({**CONFIG, "plaintext": False, "tls": paths}, ServerConfig, "server.yaml")
    tls = config.tls
    assert tls is not None
    assert tls.ca_key is not None

    def decode(data: bytes) -> None:
        for name, piece in zip(names, [*pieces_of(data), b"", b"", b"", b""], strict=False):
            (folder / name).write_bytes(piece)
        _credentials(tls, certified=True)
        _credentials(tls, certified=False)
        loaded = Authority.load(tls.ca, tls.ca_key)
        loaded.renew_server(tls.certificate, tls.key, datetime(2100, 1, 1, tzinfo=UTC))
        made = loaded.certify(KEYS[CLIENT].public_key(), CLIENT, "device", 3600.0, datetime.now(UTC))
        assert made.not_valid_after_utc <= loaded.certificate.not_valid_after_utc
        loaded.vouch(CLIENT, bytes(32))

    yield decode


@cache
def tls_pieces() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        make_authority(Path(folder), ["localhost", "127.0.0.1"])
        return [(Path(folder) / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem", "server.key")]


def tls_hostile() -> list[bytes]:
    """Each file replaced by another; and pairs that belong together, of kinds that do not."""
    good, seeds = tls_pieces(), []
    for place in range(4):
        for other in certificates_hostile() if place % 2 == 0 else keys_hostile():
            seeds.append(framed([*good[:place], other, *good[place + 1 :]]))
    for key in [*strange_keys(), KEYS[CLIENT]]:
        own = [_lasting(KEYS[CLIENT], CLIENT, key.public_key()), _private(key)]
        seeds += [framed([*own, *good[2:]]), framed([*good[:2], *own]), framed([*own, *own])]
    return seeds


# At a client


@contextmanager
def answer(folder: Path) -> Iterator[Decode]:
    """What a coordinator answers to who wants to enrol, and the certificate with which it renews."""

    def decode(data: bytes) -> None:
        fresh = folder / f"{FOLDER}.new"
        fresh.mkdir(exist_ok=True)
        (fresh / KEY).write_bytes(_private(KEYS[NEWCOMER]))
        (fresh / SIGNING_KEY).write_bytes(_private(_SIGNING))
        known = enrolment._settled(folder, NEWCOMER, SERVER, _lasting(KEYS[CLIENT], "ca"), pb.EnrolResponse.FromString(data))
        _check_identity(known)
        assert known.name == NEWCOMER
        assert enrolment.held(folder) == known

    yield decode


@contextmanager
def renewed(folder: Path) -> Iterator[Decode]:
    """What it answers to who wants the next certificate: what cannot be used takes no place."""
    place = folder / FOLDER
    place.mkdir()
    for name, content in zip((ABOUT, AUTHORITY, CERTIFICATE, KEY), pieces_of(_identity_with()), strict=True):
        (place / name).write_bytes(content)
    (place / SIGNING_KEY).write_bytes(_private(_SIGNING))

    def decode(data: bytes) -> None:
        known = read_identity(place)
        try:
            enrolment._renewed(known, pb.RenewResponse.FromString(data))
        finally:
            _check_identity(read_identity(place))

    yield decode


def _der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def _ders() -> list[bytes]:
    """Certificates for which there may be no other reader."""
    import ssl

    return [ssl.PEM_cert_to_DER_cert(one.decode()) for one in certificates_hostile() if b"END" in one]


def answer_seeds() -> list[bytes]:
    own = _der(_lasting(KEYS[NEWCOMER], NEWCOMER))
    said = pb.EnrolResponse(certificate=own, name=NEWCOMER, role="device", voucher=_vouched(NEWCOMER))
    return [said.SerializeToString()]


def answer_hostile() -> list[bytes]:
    own = _der(_lasting(KEYS[NEWCOMER], NEWCOMER))
    names = ["../../escaped", "/etc", "", "alice", "\n", "x" * 100_000]
    said = [pb.EnrolResponse(certificate=own, name=name, role="device") for name in names]
    said += [pb.EnrolResponse(certificate=own, name=NEWCOMER, role=role) for role in ("", "operator", "\x1b[2J", "x" * 100_000)]
    said += [pb.EnrolResponse(certificate=one, name=NEWCOMER, role="device") for one in _ders()]
    said += [pb.EnrolResponse(certificate=own, name=NEWCOMER, role="device", voucher=one) for one in _vouchers_hostile()]
    return [one.SerializeToString() for one in said]


def renewed_seeds() -> list[bytes]:
    own = _der(_lasting(KEYS[CLIENT], CLIENT))
    return [pb.RenewResponse(certificate=own, voucher=_vouched(CLIENT)).SerializeToString()]


def renewed_hostile() -> list[bytes]:
    own, other = (_der(_lasting(KEYS[name], CLIENT)) for name in (CLIENT, NEWCOMER))
    said = [pb.RenewResponse(certificate=one) for one in [other, *_ders()]]
    said += [pb.RenewResponse(certificate=own, voucher=one) for one in _vouchers_hostile()]
    return [one.SerializeToString() for one in said]


def _vouched(name: str) -> bytes:
    return sign(KEYS[CLIENT], name, _SIGNING.public_key().public_bytes_raw())


def _vouchers_hostile() -> list[bytes]:
    good = _vouched(CLIENT)
    return [_vouched("mallory"), good[:-1], good + b"\0", b"\x30\x06\x02\x01\x00\x02\x01\x00", bytes(64), bytes(100_000)]


@contextmanager
def owners_voucher(folder: Path) -> Iterator[Decode]:
    """A file that an owner was given, to be kept; what is not for this device takes no place."""
    (folder / SIGNING_KEY).write_bytes(_private(_SIGNING))
    key, ca = SigningKey.of(folder), _lasting(KEYS[CLIENT], "ca")

    def decode(data: bytes) -> None:
        (folder / VOUCHER).unlink(missing_ok=True)
        made = Voucher.parse(data, "alice.voucher")
        assert is_name(made.name), "a name that nobody may have"
        with suppress(Deceived):
            check(made.signature, made.name, made.key, ca, datetime.now(UTC))
            assert (made.name, made.key) == (CLIENT, key.public), "somebody whom the authority has not certified"
        key.keep(made)
        assert key.signer(made.name).voucher == made.signature

    yield decode


_GOOD_VOUCHER = Voucher(CLIENT, _SIGNING.public_key().public_bytes_raw(), _vouched(CLIENT))


def vouchers_in_files_hostile() -> list[bytes]:
    told = json.loads(str(_GOOD_VOUCHER))
    changes: list[dict[str, Any]] = [
        *({"name": name} for name in ("../x", "", 5, None, ["a"], "\ud800", "x" * 5000)),
        *({"key": key} for key in (None, 5, "", "00" * 32, "ed25519:" + "00" * 32, "sha256:" + "00" * 32, {})),
        *({"signature": signature} for signature in (None, 5, "", "0", "zz", [])),
        *({"choral voucher": form} for form in (None, "1", 2, [])),
    ]
    return [*(json.dumps(told | change).encode() for change in changes), b"[" * 100_000, b"null", b"7", b"\xff", b""]


_AT_THE_GATE = (Unauthenticated, Revoked)
_REFUSED = (Aborted, DecodeError)
TARGETS = [
    Target("token", in_memory(token), token_seeds, (TrustError,), (b"choral-",), told=300, hostile=lambda: TOKEN_HOSTILE),
    Target(
        "content of a token",
        in_memory(signed_token),
        lambda: [_token_content("alice")],
        (TrustError,),
        told=300,
        hostile=lambda: [_token_content(name) for name in ("/../../escaped", "..", "", "\0", "x" * 500, "a/b", "a\n")],
    ),
    Target(
        "enrolment",
        at_registry(Registry.enrol),
        lambda: [asked(request(KEYS[NEWCOMER]))],
        _REFUSED,
        DER,
        told=TOLD,
        hostile=enrolment_hostile,
    ),
    Target(
        "signing request",
        at_registry(signed_request),
        lambda: [request(KEYS[NEWCOMER])],
        _REFUSED,
        DER,
        told=TOLD,
        hostile=requests_hostile,
    ),
    Target(
        "renewal",
        at_registry(Registry.renew),
        renewal_seeds,
        (*_REFUSED, *_AT_THE_GATE),
        DER,
        told=TOLD,
        hostile=renewal_hostile,
    ),
    Target(
        "certificate of a caller",
        at_registry(Registry.identify),
        lambda: [certificate(KEYS[CLIENT], CLIENT)],
        _AT_THE_GATE,
        PEM,
        told=TOLD,
        hostile=certificates_hostile,
    ),
    Target("identity", identity, lambda: [_identity_with()], (TrustError,), PEM, hostile=identity_hostile),
    Target("TLS files of a coordinator", tls_files, lambda: [framed(tls_pieces())], (TrustError,), PEM, hostile=tls_hostile),
    Target(
        "voucher of an owner",
        owners_voucher,
        lambda: [str(_GOOD_VOUCHER).encode()],
        (TrustError,),
        hostile=vouchers_in_files_hostile,
    ),
    Target("answer to an enrolment", answer, answer_seeds, (TrustError, DecodeError), DER, told=TOLD, hostile=answer_hostile),
    Target("answer to a renewal", renewed, renewed_seeds, (TrustError, DecodeError), DER, told=TOLD, hostile=renewed_hostile),
]

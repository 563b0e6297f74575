"""Who belongs: tokens, enrolment, renewal, revocation, and whose a certificate is."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from choral.errors import ChoralError, ConfigError, InvalidMessage, NotAllowed, Revoked, TokenRefused, Unauthenticated, WrongState
from choral.identity import UNREADABLE
from choral.names import ALLOWED, is_name
from choral.token import PROOF, Token, digest_of
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from choral_server.caller import Caller, Role
from choral_server.records import EventRecord, MemberRecord, TokenRecord
from choral_server.store import Store
from choral_server.trust import Authority

log = structlog.get_logger()
_TOKEN_S = 3600.0
_LONGEST_TOKEN_S = 31_536_000.0
_REQUEST_BYTES = 4096
_REMEMBERED = 20_000  # certificates whose owner is known without parsing them again


@dataclass(frozen=True, slots=True)
class Roles:
    """Who is an operator or a viewer, where certificates come from an authority that is not ours."""

    operators: frozenset[str] = frozenset()
    viewers: frozenset[str] = frozenset()

    def of(self, name: str) -> Role:
        """What somebody may do."""
        if name in self.operators:
            return Role.OPERATOR
        return Role.VIEWER if name in self.viewers else Role.DEVICE


class Membership:
    """Keeps the members. `authority` signs their certificates; None: another does, and `roles` says who is more than a device.

    `expelled(name, reason)` is called once somebody does not belong any more, `replaced(name, reason)` once it has other keys.
    """

    def __init__(
        self,
        store: Store,
        authority: Authority | None,
        certificate_s: float,
        clock: Callable[[], datetime],
        roles: Roles | None = None,
        certified: bool = True,
    ) -> None:
        self._store = store
        self._authority = authority
        self._certificate_s = certificate_s
        self._clock = clock
        self._roles = roles or Roles()
        self._certified = certified
        self._turn = asyncio.Lock()
        self._certificates: dict[bytes, Caller] = {}
        self._refusals: set[tuple[str, type[ChoralError]]] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self.enrolment_port = 0
        self.expelled: Callable[[str, str], None] = lambda name, reason: None
        self.replaced: Callable[[str, str], None] = lambda name, reason: None

    # Coming to belong

    async def issue(self, name: str, role: Role, expires_s: float, replacing: bool) -> tuple[Token, datetime]:
        """A token, and until when it can be used. Raises ConfigError or WrongState."""
        if self._authority is None:
            raise WrongState(
                "this coordinator enrols nobody: tls.ca_key is not given, and certificates come from elsewhere, if any"
            )
        if not is_name(name):
            raise ConfigError(f"name {name[:80]!r} is not allowed: use {ALLOWED}")
        seconds = expires_s or _TOKEN_S
        if not 0 < seconds <= _LONGEST_TOKEN_S:
            raise ConfigError(f"a token cannot expire after {seconds:g} s: give more than 0 and at most a year")
        async with self._turn:
            known, now = self._store.members.get(name), self._clock()
            if known is not None and known.revoked_at is None and not replacing:
                raise WrongState(
                    f"{name} is enrolled already, as {known.role.value}: give --replace, and its certificate is void when the "
                    "token is used; or choose another name"
                )
            token = Token(name, self.enrolment_port, self._authority.fingerprint)
            kept = TokenRecord(digest_of(token.secret), name, role, now + timedelta(seconds=seconds), replacing)
            told = f"as {role.value}, to be used until {kept.expires_at:%Y-%m-%d %H:%M} UTC"
            await self._store.commit(kept, EventRecord(now, "token issued", told, client=name))
        log.info("token issued", client=name, role=role.value)
        return token, kept.expires_at

    async def enrol(
        self, secret: bytes, request: bytes, signing_key: bytes, signature: bytes
    ) -> tuple[x509.Certificate, MemberRecord]:
        """Turn a token into a certificate. The same keys may ask again. Raises TokenRefused or InvalidMessage."""
        if self._authority is None:
            raise WrongState("this coordinator enrols nobody")
        async with self._turn:
            token, now = self._usable(secret), self._clock()
            public_key = _proven(request, signing_key, signature)
            key = key_digest(public_key)
            known = self._store.members.get(token.name)
            again = known is not None and known.key == key == token.used_by and known.revoked_at is None
            if token.used_by and not again:
                raise TokenRefused(
                    f"the token of {token.name} has been used, by this device or another: ask for a new one, and who that was"
                )
            if not again and known is not None and known.revoked_at is None and not token.replace:
                raise TokenRefused(f"{token.name} has enrolled meanwhile with another token: ask for one that replaces it")
            certificate = self._authority.certify(public_key, token.name, token.role.value, self._certificate_s, now)
            member = MemberRecord(token.name, token.role, key, signing_key, now, certificate.not_valid_after_utc)
            told = f"as {token.role.value}, with the key {key.hex()[:16]}"
            others = [] if again else self._void_of(token.name, token)
            event = EventRecord(now, "enrolled", told, client=member.name)
            await self._store.commit(replace(token, used_by=key), *others, member, event)
        log.info("enrolled", client=member.name, role=member.role.value)
        if known is not None and known.key != key:
            self.replaced(member.name, f"{member.name} has enrolled anew, with other keys")
        return certificate, member

    def _void_of(self, name: str, but: TokenRecord | None = None) -> list[TokenRecord]:
        """The tokens made out to a name, void from now on: used ones too, with which their devices could ask again."""
        made_out = [token for token in self._store.tokens.values() if token.name == name and token is not but]
        return [replace(token, void=True) for token in made_out if not token.void]

    def _usable(self, secret: bytes) -> TokenRecord:
        token = self._store.tokens.get(digest_of(secret))
        if token is None:
            raise TokenRefused("the token is unknown here: ask the coordinator's operator for a new one")
        if token.void:
            raise TokenRefused(f"the token of {token.name} is void: {token.name} was revoked, or has enrolled with another")
        if self._clock() >= token.expires_at:
            raise TokenRefused(f"the token of {token.name} expired on {token.expires_at:%Y-%m-%d %H:%M} UTC: ask for a new one")
        return token

    async def renew(self, caller: Caller, request: bytes) -> tuple[x509.Certificate, MemberRecord]:
        """The next certificate for the key that the caller shows. Raises NotAllowed, InvalidMessage or WrongState."""
        if self._authority is None:
            raise WrongState("this coordinator signs no certificates: ask whoever does for the next")
        async with self._turn:
            public_key, member = _requested(request), self._store.members.get(caller.name)
            if member is None or key_digest(public_key) != member.key:
                raise NotAllowed(f"the request of {caller.name} is for another key than the enrolled one: for that, enrol anew")
            now = self._clock()
            certificate = self._authority.certify(public_key, member.name, member.role.value, self._certificate_s, now)
            after = replace(member, expires_at=certificate.not_valid_after_utc)
            told = f"until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            await self._store.commit(after, EventRecord(now, "certificate renewed", told, client=member.name))
        log.info("certificate renewed", client=member.name)
        return certificate, after

    def voucher(self, member: MemberRecord) -> bytes:
        """What certifies a device's signing key towards other devices; none for who takes no part in a secure sum."""
        if self._authority is None or member.role is not Role.DEVICE or not member.signing_key:
            return b""
        return self._authority.vouch(member.name, member.signing_key)

    # Belonging no more

    async def revoke(self, name: str, reason: str) -> MemberRecord:
        """Let somebody in no more, and void the tokens made out to it. Raises ConfigError or WrongState."""
        if not self._certified:
            raise WrongState("in plain text nobody is known, and so nobody can be revoked: `choral clients quarantine`, or use tls")
        async with self._turn:
            known, now = self._store.members.get(name), self._clock()
            void = self._void_of(name)
            unused = [token for token in void if not token.used_by]
            if known is None and self._authority is None and is_name(name):
                known = MemberRecord(name, self._roles.of(name))  # we know others' members only by what is said of them
            if known is None and unused:
                known = MemberRecord(name, unused[0].role)
            if known is None:
                there = ", ".join(sorted(self._store.members)) or "nobody"
                raise ConfigError(f"{name!r} has not enrolled; there is {there}")
            if known.revoked_at is not None and not unused:
                raise WrongState(f"{name} was revoked on {known.revoked_at:%Y-%m-%d %H:%M} UTC already: {known.reason}")
            member = replace(known, revoked_at=now, reason=reason)
            await self._store.commit(member, *void, EventRecord(now, "revoked", reason, client=name))
        log.warning("revoked", client=name, reason=reason)
        self.expelled(name, self._told(member))
        return member

    # Whose a certificate is

    def identify(self, certificate: bytes) -> Caller:
        """The member with this certificate (PEM), which TLS has verified. Raises Unauthenticated or Revoked."""
        caller = self._certificates.get(certificate)
        if caller is None:
            if len(self._certificates) >= _REMEMBERED:
                self._certificates.clear()
            caller = self._certificates[certificate] = _owner(certificate)
        if caller.expires_at is not None and self._clock() >= caller.expires_at:
            raise Unauthenticated(
                f"the certificate of {caller.name} expired on {caller.expires_at:%Y-%m-%d %H:%M} UTC: enrol again with a new token"
            )
        member = self._store.members.get(caller.name)
        if member is not None and member.revoked_at is not None:
            raise Revoked(self._told(member))
        if self._authority is None:
            return replace(caller, role=self._roles.of(caller.name))
        if member is None:
            raise Unauthenticated(
                f"{caller.name} has a certificate and is not known here: was the database replaced? Enrol again with a new token"
            )
        if member.key != caller.key:
            raise Unauthenticated(f"{caller.name} has enrolled anew, with other keys; this certificate is void")
        return replace(caller, role=member.role)

    def refused(self, caller: Caller, error: ChoralError) -> None:
        """A member was turned away: an event, of each kind one per member, so that nobody fills the disk."""
        if not caller.certified or (caller.name, type(error)) in self._refusals:
            return
        self._refusals.add((caller.name, type(error)))
        event = EventRecord(self._clock(), "call refused", str(error), client=caller.name)
        telling = asyncio.ensure_future(self._store.commit(event))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def _told(self, member: MemberRecord) -> str:
        return f"{member.name} does not belong any more: {member.reason}"


def key_digest(public_key: Any) -> bytes:
    """SHA-256 by which a public key is known."""
    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def _owner(certificate: bytes) -> Caller:
    try:
        read = x509.load_pem_x509_certificate(certificate)
        names = read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key, expires_at = key_digest(read.public_key()), read.not_valid_after_utc
    except UNREADABLE as error:
        raise Unauthenticated(f"the certificate cannot be read ({error}): make another") from error
    name = str(names[0].value) if len(names) == 1 else ""
    if not is_name(name):
        raise Unauthenticated(f"the certificate's common name {name[:80]!r} is no name here: use {ALLOWED}")
    return Caller(name, None, True, key, expires_at)


def _requested(request: bytes) -> Any:
    """The public key of a signing request that it has signed. Raises InvalidMessage."""
    if len(request) > _REQUEST_BYTES:
        raise InvalidMessage(f"a signing request of {len(request)} bytes: at most {_REQUEST_BYTES} are read")
    try:
        read = x509.load_der_x509_csr(request)
        key, signed = read.public_key(), read.is_signature_valid
    except UNREADABLE as error:
        raise InvalidMessage(f"the signing request cannot be read ({error}): update Choral on both sides") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidMessage("the signing request is for a key of another kind: an ECDSA P-256 key is needed")
    if not signed:
        raise InvalidMessage("the signing request is not signed by the key that it is for")
    return key


def _proven(request: bytes, signing_key: bytes, signature: bytes) -> Any:
    """The public key of a signing request whose sender also has the private part of `signing_key`. Raises InvalidMessage."""
    key = _requested(request)
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(signing_key).verify(signature, PROOF + request)
    except (ValueError, InvalidSignature) as error:
        raise InvalidMessage("the signing key does not belong to who asks: its signature of the request is wrong") from error
    return key

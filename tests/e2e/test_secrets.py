"""No secret is anywhere but where it belongs: not in logs, listings, command lines, environments, or other files."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

from choral.token import Token
from e2e.federation import Federation, Process

BELONGS = {".key", ".token"}  # files that are secrets


def forms(secret: bytes) -> Iterator[bytes]:
    """As what it might be written."""
    yield from (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret).rstrip(b"="))


def secrets(folder: Path) -> Iterator[bytes]:
    """Of all tokens and private keys under `folder`."""
    for path in folder.rglob("*.token"):
        yield path.read_bytes()
        yield from forms(Token.parse(path.read_text()).secret)
    for path in folder.rglob("*.key"):
        content = path.read_bytes()
        lines = [line for line in content.splitlines() if line and b"-----" not in line]
        yield from (line for line in lines if len(line) >= 32)
        if len(content) == 32:
            yield from forms(content)


def places(federation: Federation, started: list[Process]) -> Iterator[tuple[str, bytes]]:
    """Everything that somebody else might read."""
    for process in federation.processes:
        yield f"output of {process.name}", (process.stdout + process.stderr).encode()
    for process in started:
        for name in ("cmdline", "environ"):
            yield f"{name} of {process.name}", Path(f"/proc/{process.popen.pid}/{name}").read_bytes()
    for path in federation.folder.rglob("*"):
        if path.is_file() and path.suffix not in BELONGS:
            yield str(path), path.read_bytes()


def test_no_secret_is_written_or_shown(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        coordinator = federation.coordinator(run={"rounds": 10_000, "schedule": {"interval_s": 0.1}}, exit_when_done=False)
        started = [coordinator, *(federation.client(name) for name in ("alice", "bob"))]
        coordinator.saw("round done", 2)
        used = federation.folder / "alice.token"
        refused = federation.start(
            "again", "client", "enrol", f"@{used}", "--server", federation.address, "--state", tmp_path / "again"
        )
        assert (refused.code(), "has been used, by this device or another" in refused.stderr) == (8, True)
        mistyped = tmp_path / "mistyped.token"
        mistyped.write_text(used.read_text()[:-1])
        damaged = federation.start("damaged", "client", "enrol", f"@{mistyped}", "--server", federation.address)
        assert (damaged.code(), "is damaged" in damaged.stderr) == (6, True)
        mistyped.unlink()
        for command in (
            ("events",),
            ("clients", "enrolled"),
            ("clients", "list"),
            ("audit", "show"),
            ("doctor",),
            ("runs", "list"),
        ):
            assert federation.command(*command, "-c", federation.config).stdout
        looked_for = set(secrets(federation.folder))
        assert len(looked_for) > 20  # tokens, the keys of the authority, of the server, of the history, and two of each client
        found = [(where, secret) for where, content in places(federation, started) for secret in looked_for if secret in content]
        assert not found
        shown = dict(places(federation, started))
        assert any(b"alice" in content for where, content in shown.items() if where.startswith("cmdline"))  # it does look there
        assert b"choral.yaml" in shown["cmdline of coordinator"]


def test_files_that_are_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        coordinator = federation.coordinator(run={"rounds": 10_000, "schedule": {"interval_s": 0.1}}, exit_when_done=False)
        for name in ("alice", "bob"):
            federation.client(name)
        coordinator.saw("round done")
        kept = [path for path in federation.folder.rglob("*") if path.suffix in BELONGS]
        assert {path.name for path in kept} >= {"ca.key", "server.key", "history.key", "tls.key", "signing.key", "alice.token"}
        assert {path.name: oct(path.stat().st_mode & 0o077) for path in kept} == {path.name: "0o0" for path in kept}

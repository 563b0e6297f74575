"""Other files in which the newest version can be fetched, beside it on the local disk. They are made anew when they are lost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
from choral.errors import InvalidMessage
from choral.forms import BF16, DELTA, difference, halved, restored
from choral.messages import Form, VersionRef

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class VersionForms:
    """Makes what `download` says: none, bf16 (of the tensors in `rounded`) or delta."""

    download: str
    rounded: frozenset[str]

    def make(self, version: VersionRef, path: Path, before: tuple[VersionRef, Path] | None) -> tuple[Form, ...]:
        """The forms of a version, whose file is at `path`, and perhaps that of the one before; those of others are deleted.

        There is none that would not be smaller than the version, or cannot be made. Slow for large models: call it in a thread.
        """
        try:
            for other in path.parent.glob(".[0-9]*.form"):
                other.unlink(missing_ok=True)
            form = self._make(version, path, before)
        except (OSError, InvalidMessage) as error:  # the version itself can be fetched
            log.warning("version cannot be had in fewer bytes", version=version.number, form=self.download, reason=str(error))
            return ()
        return (form,) if form is not None and form.size_bytes < version.size_bytes else ()

    def _make(self, version: VersionRef, path: Path, before: tuple[VersionRef, Path] | None) -> Form | None:
        made = path_of(path, self.download)
        if self.download == BF16:
            with path.open("rb") as whole:
                size_bytes = _write(made, halved(whole, self.rounded))
            with made.open("rb") as form:
                digest = hashlib.sha256()
                for piece in restored(form, self.rounded):
                    digest.update(piece)
            return Form(BF16, size_bytes, digest.digest())
        if self.download == DELTA and before is not None and before[1].exists():
            with ExitStack() as files:
                whole, base = (files.enter_context(one.open("rb")) for one in (path, before[1]))
                size_bytes = _write(made, difference(whole, base))
            return Form(DELTA, size_bytes, version.digest, before[0].digest)
        return None


def path_of(version: Path, name: str) -> Path:
    """Where a form of the version whose file is `version` is; a name that no form has leads nowhere."""
    return version.with_name(f".{version.name.partition('.')[0]}.{name if name in (BF16, DELTA) else 'no'}.form")


def _write(path: Path, pieces: Iterable[bytes]) -> int:
    """Put a file at `path`, whole; the number of its bytes."""
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("wb") as file:
        file.writelines(pieces)
        size_bytes = file.tell()
    aside.replace(path)
    return size_bytes

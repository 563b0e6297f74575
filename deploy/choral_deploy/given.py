"""Words that must not stand in a command line, where every user of the machine can read them."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def text(argument: str, what: str = "the token") -> str:
    """The argument itself; of @FILE the content, of - what comes on standard input. Raises ConfigError, which names `what`."""
    from choral.errors import ConfigError

    if argument == "-":
        return sys.stdin.read(65_536)
    if not argument.startswith("@"):
        return argument
    try:
        return Path(argument[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{argument[1:]} cannot be read ({error}): give the file that holds {what}") from error


def hand_over(path: Path, secret: str) -> None:
    """Write a file that only this user can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secret)

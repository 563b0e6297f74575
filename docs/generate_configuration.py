"""Writes docs/configuration.md from the configuration classes, so that the two cannot disagree (a test compares them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from choral_client.config import ClientConfig
from choral_client.guard import Guard
from choral_server.config import ServerConfig
from pydantic import BaseModel

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

Unknown keys, wrong types and impossible combinations are refused with the file, the key, the value and what is allowed.
Names end in their unit: `deadline_s` is in seconds. Relative paths count from the folder of the file.

This page is written by `docs/generate_configuration.py` from the classes that check the files.
"""


def page() -> str:
    """The whole page."""
    server = "\n## Coordinator\n\n`choral server --config choral.yaml`\n\n" + _table(ServerConfig)
    client = (
        "\n## Client\n\n`choral client --config client.yaml`, or each key as a flag (`first_contact_s` is `--first-contact-s`)\n\n"
    )
    guard = "\n## Guard\n\nA file of the device's owner, `guard` in the client's configuration: [guard.md](guard.md)\n\n"
    return INTRODUCTION + server + client + _table(ClientConfig) + guard + _table(Guard)


def _table(kind: type[BaseModel]) -> str:
    rows = "\n".join(f"| `{key}` | {meaning} | {default} |" for key, meaning, default in _rows(kind, ""))
    return f"| key | meaning | default |\n|---|---|---|\n{rows}\n"


def _rows(kind: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in kind.model_fields.items():
        inner = next((c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_settings(c)), None)
        if inner is not None:
            rows += _rows(inner, f"{prefix}{name}.")
        else:
            meaning = " ".join((field.description or "").split())
            rows.append((prefix + name, meaning, "required" if field.is_required() else _shown(field.default)))
    return rows


def _is_settings(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _shown(default: object) -> str:
    if default is None:
        return ""
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

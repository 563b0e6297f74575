"""Words from elsewhere in a terminal's table: shown as they are, whatever they hold."""

from __future__ import annotations

from rich.text import Text


def cell(value: object) -> Text:
    """The value as text. What would be taken for markup is none, and what would steer the terminal is replaced."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in str(value)))

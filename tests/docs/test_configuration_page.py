"""docs/configuration.md says what the configuration classes say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    generator = runpy.run_path(str(DOCS / "generate_configuration.py"))
    assert (DOCS / "configuration.md").read_text() == generator["page"](), "run: python docs/generate_configuration.py"


def test_every_key_is_explained() -> None:
    rows = [line for line in (DOCS / "configuration.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    assert all(row.split("|")[2].strip() for row in rows)

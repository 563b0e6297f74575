"""Which coordinator a command is about."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT = Path("choral.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's configuration file.")]
WhereOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        help="The coordinator's configuration file; or, from another machine, the folder of an operator's or viewer's identity.",
    ),
]

"""`choral authority`: certify signing keys, on a machine of whoever is trusted with that; it need not be the coordinator's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Certify clients' signing keys, apart from the coordinator.", no_args_is_help=True)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Folder for the authority's key and certificate.")]) -> None:
    """Make an authority that certifies signing keys and nothing else."""
    from choral_server.trust import CA_CERTIFICATE, make_voucher_authority

    make_voucher_authority(folder)
    typer.echo(f"Made an authority in {folder}. Its key never leaves this machine.")
    typer.echo(f"Hand {folder / CA_CERTIFICATE} to the owner of each device: `authority: {CA_CERTIFICATE}` in its guard.yaml.")
    typer.echo(f"Then, for each client:  choral authority certify NAME KEY --authority {folder} > NAME.voucher")


@app.command()
def certify(
    name: Annotated[str, typer.Argument(help="The client's name in the federation.")],
    key: Annotated[str, typer.Argument(help="Its key, as `choral client fingerprint` prints it on its device; @FILE to read it.")],
    authority: Annotated[Path, typer.Option(help="Folder that `choral authority init` has made.")],
) -> None:
    """Print a voucher that the key is the client's. Compare the fingerprint with its owner first: nobody else does."""
    from choral.errors import ConfigError
    from choral.fingerprint import parse_key, shown_fingerprint
    from choral.names import ALLOWED, is_name
    from choral.voucher import Voucher
    from choral_server.trust import CA_CERTIFICATE, CA_KEY, Authority

    from choral_deploy.given import text

    if not is_name(name):
        raise ConfigError(f"name {name[:80]!r} is not allowed: use {ALLOWED}")
    if not (authority / CA_KEY).exists():
        raise ConfigError(f"--authority: {authority} holds no authority: `choral authority init {authority}` makes one")
    try:
        public = parse_key(text(key, "the key").strip())
    except ValueError as error:
        raise ConfigError(f"key: {error}") from error
    signed = Authority.load(authority / CA_CERTIFICATE, authority / CA_KEY).vouch(name, public)
    typer.echo(str(Voucher(name, public, signed)), nl=False)
    typer.echo(f"{name} has the fingerprint {shown_fingerprint(public)}: is that what its owner reads on the device?", err=True)

"""`hub sign`."""

from __future__ import annotations

from pathlib import Path

import click

from graftory.commands.keygen import read_passphrase
from graftory.commands.output import json_option, print_json, working


@click.command("sign")
@click.argument("ref")
@click.option(
    "--key",
    "key_path",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The private key, as hub keygen makes it.",
)
@click.option(
    "--passphrase-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file whose first line is the key's passphrase; it is asked for if this is not given.",
)
@json_option
@click.pass_obj
def command(registry: str | None, ref: str, key_path: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Sign an adapter, its files and everything it was made from.

    Every byte is hashed before. The signature is kept in the hub and travels with push and pull;
    hub verify --key checks it. Nothing is sent anywhere.

    \b
    Example:
      hub sign trec@1 --key ~/.ssh/adapters
      hub verify trec@1 --key ~/.ssh/adapters.pub
    """
    from graftory.hub import Hub
    from graftory.hub.keys import is_encrypted, load_private_key

    hub, path = Hub.open(registry), key_path.expanduser()
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    if passphrase is None and is_encrypted(path):
        typed: str = click.prompt(f"Passphrase of {path}", hide_input=True, err=True)
        passphrase = typed.encode()
    key = load_private_key(path, passphrase)
    with working("hashing and signing"):
        signed = hub.sign(ref, key)
    if as_json:
        print_json(signed)
        return
    click.echo(f"{'signed' if signed.new else 'was signed before:'} {signed.ref}  {signed.digest[:19]}")
    click.echo(f"key {signed.key[:16]}  ancestors {signed.ancestors}  {signed.signed}")
    if signed.missing:
        click.echo(f"not in this hub, signed by their digests alone: {', '.join(signed.missing)}")

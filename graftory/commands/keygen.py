"""`hub keygen`."""

from __future__ import annotations

from pathlib import Path

import click

from graftory.commands.output import json_option, print_json
from graftory.errors import SignatureError

_MAX_PASSPHRASE = 4096


@click.command("keygen")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--passphrase", "ask", is_flag=True, help="Ask for a passphrase that the private key is encrypted with.")
@click.option(
    "--passphrase-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The same, from the first line of a file.",
)
@json_option
@click.pass_obj
def command(registry: str | None, path: Path, ask: bool, passphrase_file: Path | None, as_json: bool) -> None:  # noqa: ARG001 (the group passes it)
    """Make a key to sign adapters with.

    PATH becomes the private key: keep it to yourself, whoever has it can sign in your name. PATH.pub
    becomes the public key: give it to everybody who should check your signatures. Nothing is overwritten.

    \b
    Example:
      hub keygen ~/.ssh/adapters
      hub keygen team.key --passphrase
    """
    from graftory.hub.keys import PUBLIC_SUFFIX, create_key

    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    if ask and passphrase is None:
        typed: str = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
        passphrase = typed.encode()
    path = path.expanduser()
    key = create_key(path, passphrase)
    if as_json:
        print_json({"private": str(path), "public": f"{path}{PUBLIC_SUFFIX}", "key": key.id})
    else:
        click.echo(f"private key {path} (keep it to yourself), public key {path}{PUBLIC_SUFFIX}, id {key.id[:16]}")


def read_passphrase(path: Path) -> bytes:
    """The first line of a file.

    Raises:
        SignatureError: If there is no file, or its first line is empty or too long.
    """
    try:
        with path.expanduser().open("rb") as file:
            line = file.readline(_MAX_PASSPHRASE + 1).rstrip(b"\r\n")
    except OSError as error:
        raise SignatureError(f"{path}: no passphrase to read ({error.strerror}); give a file with one line") from None
    if not 0 < len(line) <= _MAX_PASSPHRASE:
        raise SignatureError(f"{path}: wanted a first line of 1 to {_MAX_PASSPHRASE} bytes; write the passphrase there")
    return line

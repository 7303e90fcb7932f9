"""Named remotes: `remotes.json`, short names for addresses. It holds no secret, so a hub can be shared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from graftory.errors import CorruptAdapterError, InvalidNameError, RemoteError
from graftory.hub import strict_json
from graftory.hub.depot import Depot
from graftory.hub.files import write_atomic
from graftory.hub.remotes.addresses import SCHEMES
from graftory.schema import pretty

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_MAX_NAME = 64
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/]*)(?P<path>(?:/.*)?)")
_NAMED = re.compile(r"(?P<name>[^/@:]+)(?P<rest>(?:[/@:].*)?)", re.DOTALL)
_RESERVED = {*SCHEMES, "http", "https", "ftp", "ssh", "oci"}
_KEYS = re.compile(r"hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}")
"""What access keys look like; nobody means to write one into an address."""
_SECRET = (
    "the address holds a user, a password, a token or options; give it without: keys come from the "
    "environment or the configuration of the remote's own client, and are never stored"
)
_ONE_ADAPTER = {"hf": "hf://org/repo"}
"""Schemes whose address is one adapter, not a hub of many, and how it is written."""


def remotes(depot: Depot) -> Mapping[str, str]:
    """The address of every named remote of a hub, sorted by name.

    Raises:
        CorruptAdapterError: If the file is damaged, or holds what `add_remote` would refuse.
    """
    path = _path(depot)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return MappingProxyType({})
    found = strict_json.loads(data, str(path))
    if not isinstance(found, dict) or not all(isinstance(address, str) for address in found.values()):
        raise CorruptAdapterError(f"{path}: not a list of remotes; remove it and add them again (hub remote add)")
    try:
        return MappingProxyType({check_remote_name(name): check_address(found[name]) for name in sorted(found)})
    except (InvalidNameError, RemoteError) as error:
        raise CorruptAdapterError(f"{path}: {error}; remove that line") from None


def add_remote(depot: Depot, name: str, address: str) -> None:
    """Give an address a name; a no-op if it has it. The remote itself is not asked.

    Raises:
        InvalidNameError: If the name is no name or could be taken for an address.
        RemoteError: If the address is none, holds a secret, or the name means another one.
    """
    check_remote_name(name)
    check_address(address)
    with depot.lock():
        known = dict(remotes(depot))
        if known.get(name, address) != address:
            raise RemoteError(
                f"the remote {name!r} is {known[name]} already; remove it first: hub remote remove {name}"
            )
        _write(depot, {**known, name: address})


def remove_remote(depot: Depot, name: str) -> str:
    """Forget the name of an address, and return the address. The remote itself stays as it is.

    Raises:
        RemoteError: If there is no such name.
    """
    with depot.lock():
        known = dict(remotes(depot))
        if name not in known:
            raise RemoteError(f"no remote {name!r:.80}; {_names(known)}")
        address = known.pop(name)
        _write(depot, known)
    return address


def resolve_address(depot: Depot, text: str) -> str:
    """The address that a text means: an address is itself, `origin` and `origin/trec@1` begin with a name.

    What stands behind the name is a reference there. Where the address is one adapter (`hf://org/repo`),
    it is `origin@1` or `origin:prod`.

    Raises:
        RemoteError: If there is no such name, or what stands behind it does not fit the address.
    """
    if "://" in text:
        return text
    match, known = _NAMED.fullmatch(text), remotes(depot)
    if match is None or match["name"] not in known:
        examples = ", ".join(scheme.example for scheme in SCHEMES.values())
        raise RemoteError(f"{text!r:.80} is not a remote: {_names(known)}; wanted the name of one or {examples}")
    name, rest = match["name"], match["rest"]
    address = known[name]
    one = address.partition("://")[0] in _ONE_ADAPTER
    if one and rest.startswith("/"):
        raise RemoteError(
            f"{text!r:.80}: {name} is one adapter, {address}; wanted {name}, {name}@VERSION or {name}:ALIAS"
        )
    if not one and rest and not rest.startswith("/"):
        raise RemoteError(f"{text!r:.80}: {name} is a hub of many adapters, {address}; wanted {name}/NAME{rest:.20}")
    return address.rstrip("/") + rest


def check_remote_name(name: str) -> str:
    """Return `name` if it may name a remote.

    Raises:
        InvalidNameError: If it may not.
    """
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name) or name in _RESERVED:
        raise InvalidNameError(
            f"{name!r:.80} cannot name a remote; wanted at most {_MAX_NAME} lower-case letters, digits and inner '.', "
            "'_' or '-', and not the name of a scheme"
        )
    return name


def check_address(address: str) -> str:
    """Return `address` if it may be kept: of a known scheme, and without a secret.

    Raises:
        RemoteError: If it may not; the text does not repeat what may be a secret.
    """
    match = _ADDRESS.fullmatch(address)
    host, path = (match["host"], match["path"]) if match else ("", "")
    if "@" in host or "%" in host or any(sign in address for sign in "?#") or _KEYS.search(address):
        raise RemoteError(_SECRET)
    if match is None or match["scheme"] not in SCHEMES or not address.isprintable():
        examples = ", ".join(scheme.example for scheme in SCHEMES.values())
        raise RemoteError(f"{address!r:.80} is not the address of a remote; wanted {examples}")
    scheme = match["scheme"]
    example = SCHEMES[scheme].example
    if scheme == "file":
        fits = host in ("", "localhost") and len(path) > 1
    elif ":" in host and not host.startswith("arn:"):
        raise RemoteError(_SECRET)  # a key and its secret, whose slash hides the @ behind the host
    else:
        fits = bool(host) and not (scheme in _ONE_ADAPTER and re.search("[@:]", host + path))
    if not fits:
        raise RemoteError(
            f"{address!r:.80} is not the address of a whole remote; wanted {example}, without a reference"
        )
    return address


def _path(depot: Depot) -> Path:
    return depot.folder / "remotes.json"


def _write(depot: Depot, known: Mapping[str, str]) -> None:
    data = pretty(known)
    path = _path(depot)
    if not path.exists() or path.read_bytes() != data:
        write_atomic(path, data, depot.tmp)


def _names(known: Mapping[str, str]) -> str:
    return f"this hub knows {', '.join(known)}" if known else "this hub knows none by name yet (hub remote add)"

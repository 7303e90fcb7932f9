"""Keys that sign: ed25519, as PEM files that `openssl` and `ssh-keygen` know too."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.errors import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PUBLIC_SUFFIX = ".pub"
_MAX_FILE = 1 << 16
_DER_HEAD = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an ed25519 key in its DER form (RFC 8410)."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The half of a key that everybody may have.

    Attributes:
        raw: Its 32 bytes (RFC 8032).
    """

    raw: bytes

    @property
    def id(self) -> str:
        """The sha256 of its DER form: what `openssl pkey -pubin -outform DER | sha256sum` prints."""
        return hashlib.sha256(_DER_HEAD + self.raw).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature of these bytes was made with the other half."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """The half of a key that signs. It is never printed."""

    secret: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        """The other half."""
        return PublicKey(self.secret.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self.secret.sign(message)


def create_key(path: Path, passphrase: bytes | None = None) -> PublicKey:
    """Make a key: the private half at `path`, for the owner alone, the public one at `<path>.pub`.

    Args:
        path: A file that is not there yet.
        passphrase: What encrypts the private half; it is written as it is without one.

    Raises:
        SignatureError: If one of the files exists; nothing is overwritten.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_name(path.name + PUBLIC_SUFFIX)
    for file in (path, public_path):
        if os.path.lexists(file):
            raise SignatureError(f"{file}: is there already, and a lost key cannot be made again; give another path")
    secret = Ed25519PrivateKey.generate()
    locked = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    private = secret.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked)
    public = secret.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    _write_new(path, private, mode=0o600)
    try:
        _write_new(public_path, public, mode=0o644)
    except BaseException:
        path.unlink()
        raise
    return PrivateKey(secret).public


def load_public_key(path: Path) -> PublicKey:
    """Read a public key.

    Raises:
        SignatureError: If there is none, or it is not an ed25519 key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise SignatureError(
            f"{path}: is a private key; give the public one, {path.name}{PUBLIC_SUFFIX}, and keep this file to yourself"
        )
    try:
        key = load_pem_public_key(data)
    except Exception as error:  # the library raises many kinds for bytes that are no key
        raise SignatureError(f"{path}: not a public key ({type(error).__name__}); wanted PEM of ed25519") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path}: a key of another kind; wanted ed25519, as hub keygen makes it")
    return PublicKey(key.public_bytes_raw())


def is_encrypted(path: Path) -> bool:
    """Whether a private key needs a passphrase.

    Raises:
        SignatureError: If there is no file.
    """
    return b"BEGIN ENCRYPTED PRIVATE KEY" in _read(path)


def load_private_key(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Read a private key.

    Raises:
        SignatureError: If there is none, it is not an ed25519 key, or the passphrase is missing or wrong.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data, encrypted = _read(path), is_encrypted(path)
    if encrypted and not passphrase:
        raise SignatureError(f"{path}: the key is encrypted; give its passphrase")
    try:
        key = load_pem_private_key(data, passphrase if encrypted else None)
    except Exception as error:  # the library raises many kinds, and their texts may quote the file
        reason = "wrong passphrase, or a damaged file" if encrypted else type(error).__name__
        raise SignatureError(f"{path}: not a private key that can be read ({reason}); make one: hub keygen") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path}: a key of another kind; wanted ed25519, as hub keygen makes it")
    return PrivateKey(key)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise SignatureError(f"{path}: no key to read ({error.strerror}); make one: hub keygen {path}") from None
    if len(data) > _MAX_FILE:
        raise SignatureError(f"{path}: larger than any key; wanted a PEM file of a few hundred bytes")
    return data


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise

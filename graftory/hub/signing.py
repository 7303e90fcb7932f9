"""Signatures over a version and everything it was made from. The format is documented in docs/signing.md.

The statement names the record and every file by sha256, and the same of every ancestor, so that a changed
byte anywhere in the family is found. It needs no network and nobody's permission, only a key.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from graftory.adapter import AdapterRef
from graftory.errors import ConfigError, CorruptAdapterError, InvalidNameError, SignatureError
from graftory.hub import strict_json
from graftory.hub.depot import Depot
from graftory.hub.keys import PrivateKey, PublicKey
from graftory.hub.records import FileEntry, Record, record_from_bytes
from graftory.hub.resolve import resolve
from graftory.hub.signature_store import MAX_BYTES
from graftory.schema import Json, canonical, decode, encode

FORMAT = "graftory-signature"
SCHEMA = 1
PREFIX = b"graftory-signature-v1\n"
"""Stands before the statement in what is signed, so that no signature of ours means anything elsewhere."""


@dataclass(frozen=True, slots=True)
class SignedAncestor:
    """An adapter that the signed one was made from.

    Attributes:
        ref: `name@version` where the signer had it, else as the lineage calls it.
        digest: Its digest, which covers its files and specification.
        record: sha256 of its record's bytes; None if the signer did not have it.
        files: Its files; empty if the signer did not have it.
    """

    ref: str
    digest: str
    record: str | None
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """What a signature says.

    Attributes:
        format: `graftory-signature`.
        schema: 1.
        name: Name of the adapter.
        version: Its version.
        digest: Its digest.
        record: sha256 of its record's bytes.
        files: Its files.
        ancestors: Every ancestor that the signer knew of, ordered by digest.
        signed: When, ISO 8601 in UTC, by the signer's clock.
        key: Id of the key.
    """

    format: str
    schema: int
    name: str
    version: int
    digest: str
    record: str
    files: tuple[FileEntry, ...]
    ancestors: tuple[SignedAncestor, ...]
    signed: str
    key: str


@dataclass(frozen=True, slots=True)
class Signed:
    """A signature that was checked, with all it covers.

    Attributes:
        ref: The adapter.
        digest: Its digest.
        key: Id of the key.
        signed: When, by the signer's clock.
        ancestors: How many ancestors were checked byte for byte.
        missing: Ancestors that are not in this hub. Their digests are signed, their bytes cannot be looked at.
        new: Whether the signature was made just now.
    """

    ref: str
    digest: str
    key: str
    signed: str
    ancestors: int
    missing: tuple[str, ...]
    new: bool = False


def sign(depot: Depot, ref: str | AdapterRef, key: PrivateKey) -> Signed:
    """Sign a version with all it was made from; every byte is hashed first. A no-op if the key has signed it.

    Raises:
        AdapterNotFoundError: If the reference names nothing here.
        CorruptAdapterError: If bytes are not the recorded ones: nobody should sign those.
        SignatureError: If the key's earlier signature is not right, or a parent that a composition needs
            is not here.
    """
    record = _record(depot, ref)
    key_id = key.public.id
    if key_id in depot.signatures.of(record.name, record.version):
        return check_signature(depot, record, [key.public])
    statement = make_statement(depot, record, key_id)
    checked = _check(depot, record, statement)
    new = depot.add_signature(record, key_id, seal(statement, key))
    return replace(checked, new=new)


def verify_signed(depot: Depot, ref: str | AdapterRef, keys: Sequence[PublicKey]) -> Signed:
    """Check that one of the keys signed a version. Raises as `check_signature`, and as `resolve`."""
    return check_signature(depot, _record(depot, ref), keys)


def check_signature(depot: Depot, record: Record, public_keys: Sequence[PublicKey]) -> Signed:
    """Check that one of the keys signed a version, and that it and its ancestors are what was signed.

    Signatures of other keys are not looked at: anybody may add them. Every file and record is hashed.
    An ancestor that is not here is named, not an error, as `hub push` sends only those that a
    composition needs; one of those must be here.

    Raises:
        SignatureError: If there is no signature of these keys, or one that is not over what is here.
        CorruptAdapterError: If a record or file is damaged.
    """
    trusted = {key.id: key for key in public_keys}
    found = depot.signatures.of(record.name, record.version)
    mine = [key_id for key_id in trusted if key_id in found]
    if not mine:
        by = f"it has signatures of {len(found)} other keys" if found else "it is not signed"
        raise SignatureError(f"{record.ref}: no signature of the given keys ({by}); ask its author to sign it")
    statements = [open_sealed(found[key_id], trusted[key_id], str(record.ref)) for key_id in mine]
    checked = [_check(depot, record, statement) for statement in statements]
    return checked[0]


def make_statement(depot: Depot, record: Record, key_id: str) -> Statement:
    """What a key says of a version as it is here, all bytes hashed."""
    ancestors = []
    for digest, (ref, ancestor) in sorted(_family(depot, record).items()):
        if ancestor is None:
            ancestors.append(SignedAncestor(ref, digest, None, ()))
        else:
            _check_files(depot, ancestor)
            source = hashlib.sha256(ancestor.source).hexdigest()
            ancestors.append(SignedAncestor(str(ancestor.ref), digest, source, ancestor.files))
    _check_files(depot, record)
    return Statement(
        format=FORMAT,
        schema=SCHEMA,
        name=record.name,
        version=record.version,
        digest=record.digest,
        record=hashlib.sha256(record.source).hexdigest(),
        files=record.files,
        ancestors=tuple(ancestors),
        signed=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        key=key_id,
    )


def seal(statement: Statement, key: PrivateKey) -> bytes:
    """The bytes of a signature file: the statement and its signature, as canonical JSON."""
    signature = key.sign(PREFIX + canonical(statement))
    return _sealed(encode(statement), signature)


def open_sealed(data: bytes, key: PublicKey, where: str) -> Statement:
    """The statement of a signature file, its signature checked before anything it says is used.

    Args:
        data: The file's bytes.
        key: Whose signature it must be.
        where: What is said to be signed, for the error text.

    Raises:
        SignatureError: If it is not exactly what `seal` writes, or not signed by this key.
    """
    try:
        sealed = strict_json.loads(data, where, limit=MAX_BYTES)
        content, signature = sealed["statement"], base64.b64decode(sealed["signature"], validate=True)
        unchanged = _sealed(content, signature) == data
    except (CorruptAdapterError, KeyError, TypeError, ValueError):
        unchanged = False
    if not unchanged:
        raise _refused(where, "its signature file is damaged or not written as it must be")
    if not key.verifies(signature, PREFIX + canonical(content)):
        raise _refused(where, f"the signature is not of key {key.id[:16]}…, or was changed")
    try:
        statement = decode(Statement, content, where)
    except ConfigError as error:
        raise _refused(where, f"its signature says what is not understood ({error})") from None
    if (statement.format, statement.schema, statement.key) != (FORMAT, SCHEMA, key.id):
        raise _refused(where, "its signature is of another format or names another key")
    return statement


def _sealed(statement: Json, signature: bytes) -> bytes:
    return canonical({"signature": base64.b64encode(signature).decode(), "statement": statement}) + b"\n"


def _record(depot: Depot, ref: str | AdapterRef) -> Record:
    found = resolve(depot, ref)
    return depot.records.read(found.name, found.version or 0)


def _check(depot: Depot, record: Record, statement: Statement) -> Signed:
    said = (statement.name, statement.version, statement.digest, statement.record, statement.files)
    source = hashlib.sha256(record.source).hexdigest()
    if said != (record.name, record.version, record.digest, source, record.files):
        raise _refused(
            str(record.ref), f"the signature is over {statement.name}@{statement.version} with other content"
        )
    _check_files(depot, record)
    present: dict[str, Record] = {}
    for item in statement.ancestors:
        found = _ancestor(depot, item, record)
        if found is not None:
            _check_files(depot, found)
            present[item.digest] = found
    listed = {item.digest: item for item in statement.ancestors}
    _check_all_listed(record, listed, present)
    missing = tuple(item.ref for item in statement.ancestors if item.digest not in present)
    return Signed(str(record.ref), record.digest, statement.key, statement.signed, len(present), missing)


def _ancestor(depot: Depot, item: SignedAncestor, child: Record) -> Record | None:
    """The signed ancestor if it is here.

    Raises:
        SignatureError: If another adapter is in its place, or its record was changed.
    """
    if item.record is None:
        return depot.records.find(item.digest, _name(item.ref))
    try:
        ref = AdapterRef.parse(item.ref)
        path = depot.records.path(ref.name, ref.version or 0)
        data = path.read_bytes()
    except InvalidNameError as error:
        raise _refused(str(child.ref), f"its signature names an impossible ancestor ({error})") from None
    except FileNotFoundError:
        return None
    if hashlib.sha256(data).hexdigest() != item.record:
        raise _refused(str(child.ref), f"its ancestor {item.ref} is not the one that was signed ({path})")
    record = record_from_bytes(data, str(path))
    if (record.digest, record.files) != (item.digest, item.files):
        raise _refused(str(child.ref), f"its signature contradicts itself about the ancestor {item.ref}")
    return record


def _check_all_listed(record: Record, listed: Mapping[str, SignedAncestor], present: Mapping[str, Record]) -> None:
    """Check that no ancestor was left out, and that those which a composition needs are here.

    Raises:
        SignatureError: If one was, or is not.
    """
    todo, seen = [(record, True)], set()
    while todo:
        child, needed = todo.pop()
        for parent in child.spec.lineage.parents:
            if parent.digest not in listed:
                raise _refused(str(record.ref), f"its signature leaves out the ancestor {parent.ref}")
            composed = needed and parent.relation == "composed"
            if composed and parent.digest not in present:
                raise _refused(str(record.ref), f"{parent.ref}, which it is composed of, is not here")
            state = (parent.digest, composed)
            # below one that the signer did not have, nothing is listed
            if parent.digest in present and listed[parent.digest].record is not None and state not in seen:
                seen.add(state)
                todo.append((present[parent.digest], composed))


def _check_files(depot: Depot, record: Record) -> None:
    for entry in record.files:
        data = depot.blobs.map(entry.sha256, f"{record.ref} {entry.path}")
        if len(data) != entry.size:
            raise CorruptAdapterError(
                f"{record.ref} {entry.path}: has {len(data)} bytes, recorded are {entry.size}; the record is forged"
            )


def _family(depot: Depot, record: Record) -> dict[str, tuple[str, Record | None]]:
    """Every ancestor by digest, with what the lineage calls it and, if it is here, its record."""
    family: dict[str, tuple[str, Record | None]] = {}
    todo = [record]
    while todo:
        for parent in todo.pop().spec.lineage.parents:
            if parent.digest not in family:
                found = depot.records.find(parent.digest, _name(parent.ref))
                family[parent.digest] = (parent.ref, found)
                todo += [found] if found is not None else []
    return family


def _name(ref: str) -> str:
    return ref.partition("@")[0].partition(":")[0]


def _refused(ref: str, reason: str) -> SignatureError:
    return SignatureError(f"{ref}: {reason}; do not use it, pull it again from its author")

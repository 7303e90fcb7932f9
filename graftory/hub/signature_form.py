"""The form of a signature file, for those who have no key: whether it can be one, and of this version."""

from __future__ import annotations

import base64
import hashlib

from graftory.errors import ConfigError, CorruptAdapterError
from graftory.hub import strict_json
from graftory.hub.records import Record
from graftory.hub.signature_store import MAX_BYTES
from graftory.hub.signing import FORMAT, SCHEMA, Statement
from graftory.schema import canonical, decode

_SIGNATURE_BYTES = 64


def fault_of(record: Record, key_id: str, data: bytes) -> str | None:
    """What is wrong with a signature file, as far as this can be seen without its key; None if nothing is.

    Args:
        record: The version that it lies at.
        key_id: The id of the key that its name gives.
        data: Its bytes.
    """
    where = "the signature"
    try:
        sealed = strict_json.loads(data, where, limit=MAX_BYTES)
        content = sealed["statement"]
        whole = len(base64.b64decode(sealed["signature"], validate=True)) == _SIGNATURE_BYTES
        unchanged = whole and set(sealed) == {"signature", "statement"} and canonical(sealed) + b"\n" == data
        if not unchanged:
            return "it is damaged, or not written as a signature must be"
        statement = decode(Statement, content, where)
    except (CorruptAdapterError, ConfigError, KeyError, TypeError, ValueError):
        return "it is damaged, or not written as a signature must be"
    said = (statement.format, statement.schema, statement.key, statement.name, statement.version)
    if said != (FORMAT, SCHEMA, key_id, record.name, record.version):
        return f"it is of {statement.name}@{statement.version} by key {statement.key[:16]}, or of another format"
    if (statement.digest, statement.record) != (record.digest, hashlib.sha256(record.source).hexdigest()):
        return "it is over other content than this version has"
    return None

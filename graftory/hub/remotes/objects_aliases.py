"""Alias logs in an object store: `aliases/<name>/<number>.json`, each created once, in the order of their numbers.

Whoever moves an alias creates the object after the last one; of several, one gets the number, the
others look again. So no move is lost, and each object also tells what every alias means after it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from graftory.errors import ConfigError, CorruptAdapterError, RemoteError
from graftory.hub import strict_json
from graftory.hub.aliases import AliasMove
from graftory.hub.records import check_stored_name
from graftory.hub.remotes.objects_store import Bucket
from graftory.schema import canonical, decode

_NUMBER = re.compile(r"(?P<number>[0-9]{8})\.json")
_TRIES = 100


@dataclass(frozen=True, slots=True)
class _Entry:
    """One move, and what every alias of the name means after it."""

    alias: str
    version: int
    at: str
    aliases: Mapping[str, int]


def current(bucket: Bucket, name: str) -> dict[str, int]:
    """What each alias of a name means now, sorted by alias."""
    numbers = _numbers(bucket, name)
    return _after(bucket, name, numbers[-1]) if numbers else {}


def log(bucket: Bucket, name: str) -> tuple[AliasMove, ...]:
    """Every move, oldest first."""
    keys = [_key(name, number) for number in _numbers(bucket, name)]
    found = bucket.read_many(keys, strict_json.SMALL + 1)
    entries = (_parse(data, f"{bucket.address}/{key}") for key, data in found)
    return tuple(AliasMove(entry.alias, entry.version, entry.at) for entry in entries)


def move(bucket: Bucket, name: str, alias: str, version: int) -> None:
    """Let an alias mean a version from now on; a no-op if it does.

    Raises:
        RemoteError: If others move aliases of the name faster than we can.
    """
    for attempt in range(_TRIES):
        numbers = _numbers(bucket, name)
        last = numbers[-1] if numbers else 0
        aliases = _after(bucket, name, last) if last else {}
        if aliases.get(alias) == version:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        aliases = dict(sorted({**aliases, alias: version}.items()))
        data = canonical(_Entry(alias, version, now, aliases)) + b"\n"
        if bucket.create(_key(name, last + 1), data) or _read(bucket, name, last + 1) == data:
            return  # the second: ours, but the answer was lost
        time.sleep(random.uniform(0, 0.02 * min(attempt + 1, 10)))
    raise RemoteError(f"{bucket.address}: others move the aliases of {name} all the time; try again later")


def _numbers(bucket: Bucket, name: str) -> list[int]:
    keys = bucket.keys(f"aliases/{check_stored_name(name)}")
    return sorted(int(match["number"]) for match in map(_NUMBER.fullmatch, keys) if match)


def _after(bucket: Bucket, name: str, number: int) -> dict[str, int]:
    data = _read(bucket, name, number)
    where = f"{bucket.address}/{_key(name, number)}"
    if data is None:
        raise CorruptAdapterError(f"{where}: vanished while it was read; somebody deletes alias moves, try again")
    return dict(_parse(data, where).aliases)


def _read(bucket: Bucket, name: str, number: int) -> bytes | None:
    return bucket.read(_key(name, number), strict_json.SMALL + 1)


def _parse(data: bytes, where: str) -> _Entry:
    try:
        return decode(_Entry, strict_json.loads(data, where), where)
    except ConfigError as error:
        raise CorruptAdapterError(f"{error}; delete the damaged object, the move before it then counts") from None


def _key(name: str, number: int) -> str:
    return f"aliases/{check_stored_name(name)}/{number:08d}.json"

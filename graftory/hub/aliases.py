"""Aliases: names for versions that may move. `aliases/<name>.jsonl`, one line for each move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import AdapterRef
from graftory.errors import ConfigError, CorruptAdapterError, InvalidNameError
from graftory.hub import strict_json
from graftory.hub.files import write_atomic
from graftory.hub.records import check_stored_name
from graftory.schema import canonical, decode


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One line of the log: from `at` on, `alias` means `version`."""

    alias: str
    version: int
    at: str


@dataclass(frozen=True, slots=True)
class AliasStore:
    """The alias logs of one hub.

    Attributes:
        folder: The hub's `.hub` folder.
    """

    folder: Path

    def log(self, name: str) -> tuple[AliasMove, ...]:
        """Every move, oldest first.

        Raises:
            CorruptAdapterError: If a line of the log is damaged.
        """
        path = self._path(name)
        if not path.is_file():
            return ()
        try:
            lines = path.read_bytes().splitlines()
            moves = tuple(decode(AliasMove, strict_json.loads(line, str(path)), str(path)) for line in lines)
            for alias, version in {(move.alias, move.version) for move in moves}:
                AdapterRef(name, alias=alias)
                AdapterRef(name, version=version)
            return moves
        except InvalidNameError as error:
            raise CorruptAdapterError(f"{path}: {error}; remove the damaged line") from None
        except ConfigError as error:
            raise CorruptAdapterError(f"{error}; remove the damaged line") from None

    def current(self, name: str) -> dict[str, int]:
        """What each alias means now, sorted by alias."""
        moves = {move.alias: move.version for move in self.log(name)}
        return dict(sorted(moves.items()))

    def append(self, name: str, move: AliasMove) -> None:
        """Add a move; the caller holds the hub's lock. The log is replaced as a whole, so that a
        crash leaves no half line."""
        path = self._path(name)
        before = path.read_bytes() if path.is_file() else b""
        write_atomic(path, before + canonical(move) + b"\n", self.folder / "tmp")

    def _path(self, name: str) -> Path:
        return self.folder / "aliases" / f"{check_stored_name(name)}.jsonl"

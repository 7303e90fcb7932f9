"""What a verification reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftory.hub.completeness import Gap
from graftory.hub.depot import Depot
from graftory.hub.gc import Removed

PULL = "pull the version again from another hub"
PUT_ASIDE = "put this file aside, then pull the version again from another hub"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or worth knowing.

    Attributes:
        ref: The version it concerns; None if it concerns the hub.
        where: The file, below the hub's root.
        what: What is wrong.
        remedy: What to do.
    """

    ref: str | None
    where: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        versions: Versions looked at.
        files: Files hashed, each once.
        size: Bytes of these files.
        problems: What is wrong; empty if all is well.
        notes: What is worth knowing and hinders nobody: an ancestor that is not here and not needed, a
            file that is none of a hub's.
        leftovers: What hub gc would remove; not looked for when only some versions are checked.
        gaps: What is not recorded, by version; None if it was not asked for.
        signed: The key of the signature found, by version; None if no keys were given.
    """

    versions: int
    files: int
    size: int
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...] = ()
    leftovers: tuple[Removed, ...] = ()
    gaps: Mapping[str, tuple[Gap, ...]] | None = None
    signed: Mapping[str, str] | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def below(depot: Depot, path: Path) -> str:
    """A path as it is reported."""
    return path.relative_to(depot.root).as_posix()


def cause(error: Exception) -> str:
    """An error as it is reported, in one line."""
    return " ".join(str(error).split())

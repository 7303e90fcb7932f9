"""Blobs and atomic files: write order, damage, what is left after an error."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from graftory.errors import CorruptAdapterError
from graftory.hub import files
from graftory.hub.store import BlobStore


def test_layout_and_round_trip(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sha = store.write(b"bytes")
    assert sha == hashlib.sha256(b"bytes").hexdigest()
    assert (tmp_path / "blobs" / "sha256" / sha[:2] / sha).read_bytes() == b"bytes"
    assert bytes(store.map(sha, "x")) == b"bytes"
    assert not list((tmp_path / "tmp").iterdir())


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sha = store.write(b"some bytes")
    for position in range(10):
        damaged = bytearray(b"some bytes")
        damaged[position] ^= 1
        store.path(sha).write_bytes(damaged)
        assert not store.is_intact(sha)
        with pytest.raises(CorruptAdapterError, match="trec@1"):
            store.map(sha, "trec@1")


def test_missing_blob_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CorruptAdapterError, match=r"missing.*pull it again"):
        BlobStore(tmp_path).map("0" * 64, "x")


def test_writing_again_heals_and_otherwise_leaves_the_file_alone(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sha = store.write(b"bytes")
    inode = store.path(sha).stat().st_ino
    store.write(b"bytes")
    assert store.path(sha).stat().st_ino == inode
    store.path(sha).write_bytes(b"rotten")
    store.write(b"bytes")
    assert bytes(store.map(sha, "x")) == b"bytes"


def test_order_is_write_fsync_rename_fsync_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        events.append("fsync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync file")
        real_fsync(handle)

    def replace(path: Path, to: Path) -> Path:
        events.append("rename")
        return real_replace(path, to)

    files.make_folder(tmp_path / "tmp")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    files.write_atomic(target, b"x", tmp_path / "tmp")
    assert events == ["fsync file", "rename", "fsync folder"]


def test_create_exclusive_never_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    files.create_exclusive(target, b"first", tmp_path / "tmp")
    with pytest.raises(FileExistsError):
        files.create_exclusive(target, b"second", tmp_path / "tmp")
    assert target.read_bytes() == b"first"
    assert not list((tmp_path / "tmp").iterdir())


def test_create_exclusive_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "file"
    files.create_exclusive(target, b"first", tmp_path / "tmp")
    with pytest.raises(FileExistsError):
        files.create_exclusive(target, b"second", tmp_path / "tmp")
    assert target.read_bytes() == b"first"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    files.write_atomic(target, b"old", tmp_path / "tmp")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(target, b"new", tmp_path / "tmp")
    assert target.read_bytes() == b"old"
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("there", [b"", b"abc", b"abcdef", b"abcdefgh"])
def test_a_copy_goes_on_with_what_is_there(tmp_path: Path, there: bytes) -> None:
    (tmp_path / "from").write_bytes(b"abcdef")
    (tmp_path / "to").write_bytes(there)
    told: list[int] = []
    files.copy_on(tmp_path / "from", tmp_path / "to", told.append)
    assert (tmp_path / "to").read_bytes() == b"abcdef"
    assert told == ([] if there == b"abcdef" else [6])

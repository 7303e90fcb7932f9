"""Disks that fail at every operation, bytes that change, writers that are killed: nothing is lost or half there."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from graftory.errors import CorruptAdapterError, GraftoryError
from graftory.hub import Hub
from graftory.hub.files import copy_on
from graftory.hub.keys import create_key, load_private_key
from graftory.hub.locate import is_hub
from graftory.hub.store import BlobStore
from tests.hub_samples import bottleneck, lora, same, snapshot

Command = Callable[[Path], object]
State = dict[str, object]

COMMANDS: dict[str, Command] = {
    "put": lambda home: Hub(home / "hub").put("c", lora(7)),
    "put next": lambda home: Hub(home / "hub").put("a", lora(8)),
    "alias": lambda home: Hub(home / "hub").set_alias("a", "prod", 2),
    "push": lambda home: Hub(home / "hub").push("a@2", (home / "other").as_uri(), move_aliases=True),
    "push to nowhere": lambda home: Hub(home / "hub").push("a@2", (home / "new").as_uri()),
    "pull": lambda home: Hub(home / "other").pull(f"{(home / 'hub').as_uri()}/a@2", move_aliases=True),
    "sign": lambda home: Hub(home / "hub").sign("b", load_private_key(home / "key")),
    "rebuild": lambda home: Hub(home / "hub").rebuild_index(),
    "gc": lambda home: Hub(home / "hub").gc(partial_downloads=True),
    "materialize": lambda home: Hub(home / "hub").materialize("a@1", home / "folder"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hubs that share a name, one with an alias, a signature and a blob that nothing needs."""
    home = tmp_path_factory.mktemp("template")
    create_key(home / "key")
    hub, other = Hub.create(home / "hub"), Hub.create(home / "other")
    for seed in (1, 2):
        hub.put("a", lora(seed))
    hub.put("b", bottleneck())
    hub.set_alias("a", "prod", 1)
    hub.sign("a@2", load_private_key(home / "key"))
    other.put("a", lora(1))
    other.set_alias("a", "prod", 1)
    BlobStore(hub.root / ".hub").write(b"left behind")
    return home


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(template, tmp_path / "home"))


def state(home: Path) -> State:
    """What readers see in every hub there is."""
    hubs = [Hub(path) for path in sorted(home.iterdir()) if is_hub(path)]
    return {
        hub.root.name: [
            (
                row.name,
                hub.aliases(row.name),
                [(hub.record(ref).digest, hub.signatures(ref)) for ref in refs(hub, row.name)],
            )
            for row in hub.index()
        ]
        for hub in hubs
    }


def refs(hub: Hub, name: str) -> list[str]:
    return [f"{name}@{version}" for version in hub.versions(name)]


class Failing:
    """A file opened for writing, on a disk that fails."""

    def __init__(self, file: IO[Any], tick: Callable[[str], None]) -> None:
        self._file, self._tick = file, tick

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        """Write a half before the disk fails."""
        try:
            self._tick(str(self._file.name))
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)


class Disk:
    """A disk whose N-th operation fails, or all from the N-th on."""

    def __init__(self, at: int, number: int, lasting: bool) -> None:
        self.at, self.number, self.lasting, self.count = at, number, lasting, 0

    def tick(self, path: str) -> None:
        """One more operation."""
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            raise OSError(self.number, os.strerror(self.number), path)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Let it take the place of the real one."""
        opened = Path.open

        def guarded(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(self, mode, *args, **options)
            return Failing(file, disk.tick) if set(mode) & set("wxa+") else file

        disk = self
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", guarded)
            for owner, name in ((Path, "replace"), (Path, "mkdir"), (os, "link"), (os, "fsync")):
                patch.setattr(owner, name, self._ticking(getattr(owner, name)))
            yield

    def _ticking(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            self.tick(str(args[0]))
            return real(*args, **options)

        return operation


FAULTS = [(errno.ENOSPC, False, 1), (errno.ENOSPC, True, 2), (errno.EIO, False, 2), (errno.EROFS, True, 3)]
"""What goes wrong, whether it lasts, and how many operations are skipped between two that are tried."""
LEAST = {"rebuild": 3, "gc": 1, "alias": 8, "materialize": 5, "sign": 8}


@pytest.mark.parametrize(
    ("number", "lasting", "step"), FAULTS, ids=["full for a moment", "full", "broken sector", "read-only"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails_at_any_operation(
    name: str, number: int, lasting: bool, step: int, template: Path, tmp_path: Path
) -> None:
    command = COMMANDS[name]
    done = Path(shutil.copytree(template, tmp_path / "done"))
    command(done)
    after, tried = state(done), 0
    while True:
        home = Path(shutil.copytree(template, tmp_path / f"{tried}"))
        disk = Disk(tried + 1, number, lasting)
        said = attempt(disk, lambda home=home: command(home))  # type: ignore[misc]
        if disk.count <= tried:
            break
        tried += step
        check(home, template, after, said)
        command(home)
        assert state(home) == after
        shutil.rmtree(home)
    assert tried >= LEAST.get(name, 12)


def attempt(disk: Disk, act: Callable[[], object]) -> str | None:
    """What a command said on such a disk; None if it went well."""
    with disk.use():
        try:
            act()
        except GraftoryError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename}: {error.strerror}" if error.filename else "which file?"
    return None


def check(home: Path, template: Path, after: State, said: str | None) -> None:
    """Nothing is half there, and what was said is true."""
    assert said != "which file?", "the command line could not tell"
    now = state(home)
    for hub in (home / "hub", home / "other"):
        report = Hub(hub).verify()
        assert report.ok, report.problems
    if said is None:
        assert now == after
    elif " and is as it was" in said:
        path = Path(said.partition(": cannot be written")[0])
        old = template / path.relative_to(home)
        assert (path.read_bytes() if path.is_file() else None) == (old.read_bytes() if old.is_file() else None)
    assert not any(path.stat().st_size for path in home.rglob(".hub/tmp/*") if path.is_file())


LIMITS = [0, 1, 100, 500, 900]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("command", ["add", "push", "pull"])
def test_the_largest_size_of_a_file(command: str, limit: int, home: Path) -> None:
    """A limit of the system, met by the real command: one line, and all is as it was."""
    source = Hub(home / "hub").materialize("a@2", home / "folder")
    arguments = {
        "add": ["--registry", str(home / "hub"), "add", str(source), "--name", "new"],
        "push": ["--registry", str(home / "hub"), "push", "a@2", (home / "other").as_uri()],
        "pull": ["--registry", str(home / "other"), "pull", f"{(home / 'hub').as_uri()}/a@2"],
    }[command]
    before = {name: data for name, data in snapshot(home).items() if "/tmp/" not in name}
    done = subprocess.run(
        [sys.executable, "-c", "from graftory.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    left = r"(is as it was|keeps what came)"
    assert re.search(rf"cannot be written \(File too large\) and {left}; make room and try again\n$", done.stderr)
    assert done.stderr.count("\n") == 1
    assert {name: data for name, data in snapshot(home).items() if "/tmp/" not in name} == before
    assert Hub(home / "hub").verify().ok


def flipped(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file with each of its bytes changed in turn, by one bit, and put back."""
    data = path.read_bytes()
    for at in range(len(data)):
        for bit in (0, 5):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            yield at, data
    path.write_bytes(data)


def test_a_byte_changed_in_a_record_is_never_believed(home: Path) -> None:
    """Only when it was made is not under the digest; a signature covers that too."""
    hub = Hub(home / "hub")
    good = hub.record("b")
    refused = 0
    for at, _ in flipped(home / "hub/.hub/records/b/1.json"):
        try:
            found = hub.record("b@1")
        except GraftoryError:
            refused += 1
            continue
        assert (found.spec, found.files, found.digest) == (good.spec, good.files, good.digest), at
        assert found.tensors == good.tensors or not hub.verify(["b@1"]).ok
    assert refused > 1000
    assert hub.verify().ok


def test_a_byte_changed_in_the_index_is_found_and_mended(home: Path) -> None:
    hub = Hub(home / "hub")
    path = home / "hub/registry.json"
    rows = hub.index()
    for at, data in flipped(path):
        if at % 7:
            continue
        assert not hub.verify().ok, at
        hub.rebuild_index()
        assert path.read_bytes() == data
    assert hub.index() == rows


def test_a_byte_changed_in_the_log_of_aliases_is_found(home: Path) -> None:
    """By its form, or by the index that says otherwise; the time of a move alone is not told twice."""
    hub = Hub(home / "hub")
    path = next((home / "hub/.hub/aliases").rglob("a.jsonl"))
    time = path.read_bytes().index(b'"at"')
    ends = path.read_bytes().index(b",", time)
    found = 0
    for at, _ in flipped(path):
        if not time <= at < ends:
            assert not hub.verify().ok, at
            found += 1
    assert found > 30
    assert hub.verify().ok


def test_a_byte_changed_in_a_blob_is_never_exposed(home: Path) -> None:
    hub, other = Hub(home / "hub"), Hub.create(home / "third")
    weights = next(entry for entry in hub.record("b").files if entry.path.endswith(".safetensors"))
    path = BlobStore(home / "hub/.hub").path(weights.sha256)
    path.chmod(0o644)
    for _ in flipped(path):
        for act in (lambda: hub.get("b"), lambda: hub.materialize("b", home / "folder")):
            with pytest.raises(CorruptAdapterError, match=r"sha256|recorded"):
                act()
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptAdapterError, match=r"sha256|recorded"):
        other.pull(f"{(home / 'hub').as_uri()}/b")
    assert not hub.verify().ok
    assert not other.index()
    assert not (home / "folder").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_a_pull_that_breaks_off_at_any_offset_goes_on(
    share: float, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came is kept and not fetched again; what was changed meanwhile is."""
    hub, other = Hub(home / "hub"), Hub.create(home / "third")
    big = lora(3)
    ref = hub.put("big", big)
    size = next(entry.size for entry in hub.record(ref).files if entry.path.endswith(".safetensors"))
    fetched: list[int] = []

    def breaking(source: Path, target: Path, progress: Callable[[int], None]) -> None:
        if source.stat().st_size == size and not fetched:
            fetched.append(int(size * share))
            target.write_bytes(source.read_bytes()[: fetched[0]])
            raise ConnectionError("the line is cut")
        start = target.stat().st_size if target.exists() else 0
        copy_on(source, target, progress)
        if source.stat().st_size == size:
            fetched.append(target.stat().st_size - start)

    monkeypatch.setattr("graftory.hub.remotes.directory.copy_on", breaking)
    address = f"{(home / 'hub').as_uri()}/big"
    with pytest.raises(ConnectionError):
        other.pull(address)
    assert not other.index()
    assert other.verify().ok
    other.pull(address)
    assert fetched == [int(size * share), size - int(size * share)]
    assert same(other.get("big"), big)


def test_what_was_changed_in_an_unfinished_download_is_fetched_anew(home: Path) -> None:
    hub, other = Hub(home / "hub"), Hub.create(home / "third")
    entry = hub.record("b").files[-1]
    partial = other.root / ".hub/tmp/partial" / entry.sha256
    partial.parent.mkdir(parents=True)
    data = bytes(BlobStore(home / "hub/.hub").map(entry.sha256, "x"))
    for at in (0, len(data) // 2 - 1):
        partial.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 : len(data) // 2])
        other.pull(f"{(home / 'hub').as_uri()}/b")
        assert same(other.get("b"), bottleneck())
        assert not partial.exists()
        shutil.rmtree(other.root)
        Hub.create(other.root)
        partial.parent.mkdir(parents=True)


def test_a_writer_killed_with_the_lock_holds_nobody_up(home: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from graftory.hub.depot import Depot\n"
        "with Depot(Path(sys.argv[1])).lock():\n    print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(home / "hub")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        holder.send_signal(signal.SIGKILL)
    assert str(Hub(home / "hub").put("a", lora(9))) == "a@3"

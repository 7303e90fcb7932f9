"""The hub: versions of adapters, by name. Torch is imported only to make or read tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterRef, BaseModel, check_name
from graftory.hub.codecs import codec_of
from graftory.hub.depot import Depot
from graftory.hub.folders import read_folder, write_folder
from graftory.hub.index import IndexRow
from graftory.hub.lineage import lineage_graph
from graftory.hub.locate import find_hub, is_hub
from graftory.hub.records import Record
from graftory.hub.remotes import DirectoryRemote, open_remote, read_file, split_remote_ref
from graftory.hub.resolve import resolve
from graftory.hub.transfer import Progress, transfer

if TYPE_CHECKING:
    import networkx


class Hub:
    """A local hub: a folder with `registry.json` and `.hub/`.

    Its promises (docs/format.md): a version never changes; a reference appears only after its bytes are
    durable; bytes are hashed before anyone sees them; the index can be made anew; an error leaves
    records and index as they were.
    """

    def __init__(self, root: Path) -> None:
        self._depot = Depot(root)

    @classmethod
    def open(cls, path: str | Path | None = None) -> Hub:
        """The hub at `path`, or else where `GRAFTORY_REGISTRY` points, or else the nearest one upward
        of the working directory, or else the user's own, made if it is missing.

        Raises:
            HubNotFoundError: If there is none at `path` or where the variable points.
        """
        root = find_hub(path)
        return cls(root) if is_hub(root) else cls.create(root)

    @classmethod
    def create(cls, path: str | Path) -> Hub:
        """Make an empty hub in a folder; one that is there already stays as it is."""
        hub = cls(Path(path).expanduser().resolve())
        hub._depot.create()
        return hub

    @property
    def root(self) -> Path:
        """The folder of `registry.json`."""
        return self._depot.root

    def index(self) -> tuple[IndexRow, ...]:
        """A row for every name, sorted."""
        return self._depot.rows()

    def rebuild_index(self) -> tuple[IndexRow, ...]:
        """Make `registry.json` anew from the records and alias logs; gives the same bytes as ever."""
        with self._depot.lock():
            return self._depot.rebuild()

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of a name, ascending.

        Raises:
            AdapterNotFoundError: If there is no such name.
        """
        resolve(self._depot, AdapterRef(name))
        return self._depot.records.versions(name)

    def resolve(self, ref: str | AdapterRef) -> AdapterRef:
        """The `name@version` that a reference (`name`, `name@3`, `name@sha256:...`, `name:alias`) means now.

        Raises:
            InvalidNameError: If it is none of the four forms.
            AdapterNotFoundError: If it names nothing here; close names are given.
        """
        return resolve(self._depot, ref)

    def record(self, ref: str | AdapterRef) -> Record:
        """Everything about a version but its tensors. Raises as `resolve`, and `CorruptAdapterError`."""
        found = self.resolve(ref)
        return self._depot.records.read(found.name, found.version or 0)

    def get(self, ref: str | AdapterRef) -> Adapter:
        """The adapter that a reference means; every byte is hashed first.

        Raises:
            AdapterNotFoundError: If it names nothing here.
            CorruptAdapterError: If the bytes are not the recorded ones.
        """
        record = self.record(ref)
        files = self._files(record)
        codec = codec_of(record.spec)
        codec.check(files, record.spec)
        return Adapter(record.spec, codec.decode(files))

    def put(self, name: str, adapter: Adapter, *, version: int | None = None) -> AdapterRef:
        """Keep an adapter.

        Args:
            name: Name in the hub.
            adapter: What to keep: LoRA as PEFT's two files, others as `adapter.safetensors`.
            version: The version to write; by default the next one, or the one that holds the same
                adapter already.

        Raises:
            VersionConflictError: If `version` exists with other content.
            CorruptAdapterError: If tensors and specification disagree, or a weight is not finite.
        """
        AdapterRef(name, version=version)
        codec = codec_of(adapter.spec)
        files = codec.encode(adapter)
        tensors = codec.check(files, adapter.spec)
        return self._depot.publish(name, version, adapter.spec, files, tensors)

    def add(
        self, folder: str | Path, *, name: str, version: int | None = None, base: BaseModel | None = None
    ) -> AdapterRef:
        """Keep the adapter in a folder, byte for byte: PEFT's two files, or what `materialize` wrote.

        Args:
            folder: The folder.
            name: Name in the hub.
            version: As in `put`.
            base: The base model, where it is known better than the files tell it.

        Raises:
            DataError: If there is no such folder.
            CorruptAdapterError: If a file is missing or breaks its format.
            UnsupportedAdapterError: If the adapter uses something graftory does not do, or is a pickle.
            VersionConflictError: If `version` exists with other content.
        """
        AdapterRef(check_name(name), version=version)
        spec, files = read_folder(Path(folder).expanduser(), name, base)
        tensors = codec_of(spec).check(files, spec)
        return self._depot.publish(name, version, spec, files, tensors)

    def materialize(self, ref: str | AdapterRef, folder: str | Path) -> Path:
        """Write an adapter as a folder: its files, and `graftory.json` with the specification.

        Raises:
            AdapterNotFoundError: If the reference names nothing here.
            VersionConflictError: If the folder holds other files.
        """
        record = self.record(ref)
        return write_folder(Path(folder).expanduser().absolute(), record.spec, self._files(record))

    def push(self, ref: str | AdapterRef, remote: str, *, progress: Progress | None = None) -> AdapterRef:
        """Bring a version, and the parents it is composed of, to another hub; the version number stays.

        Args:
            ref: The version.
            remote: The other hub, `file:///dir`; made if the folder is missing or empty.
            progress: Told of what travels.

        Raises:
            VersionConflictError: If the other hub has the version with other content.
            RemoteError: If there is no hub and none can be made.
        """
        record = self.record(ref)
        transfer(DirectoryRemote(self.root), open_remote(remote), record, progress)
        return record.ref

    def pull(self, remote_ref: str, *, progress: Progress | None = None) -> AdapterRef:
        """Bring a version, and the parents it is composed of, from another hub; the version number stays.

        Args:
            remote_ref: The other hub and a reference there: `file:///dir/sst2@1`.
            progress: Told of what travels.

        Raises:
            AdapterNotFoundError: If the reference names nothing there.
            CorruptAdapterError: If the bytes there are not the recorded ones; nothing is kept.
            VersionConflictError: If this hub has the version with other content.
            RemoteError: If there is no hub on the path.
        """
        remote, wanted = split_remote_ref(remote_ref)
        record = remote.record(wanted)
        transfer(remote, DirectoryRemote(self.root), record, progress)
        return record.ref

    def aliases(self, name: str) -> dict[str, int]:
        """What each alias of a name means now."""
        return self._depot.aliases.current(name)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let an alias mean a version from now on.

        Raises:
            InvalidNameError: If the alias is not lower-case letters, digits, `_` and `-`.
            AdapterNotFoundError: If there is no such version.
        """
        self._depot.move_alias(name, alias, version)

    def lineage(self, ref: str | AdapterRef) -> networkx.DiGraph[str]:
        """The family of an adapter: a graph of digests, edges from parent to child with `relation` and
        `weight`, nodes with `ref`, `known` and, where known, `record`."""
        return lineage_graph(self._depot, self.record(ref))

    def _files(self, record: Record) -> dict[str, bytes]:
        return {entry.path: read_file(self._depot, record, entry.path) for entry in record.files}

"""The hub: versions of adapters, by name.

Torch is imported only to make or read tensors, and what is for one method only with that method: `hub list` waits for
neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterRef, BaseModel, check_name
from graftory.errors import AdapterNotFoundError, ConfigError
from graftory.hub.codecs import codec_of
from graftory.hub.codecs.tensors import check_finite
from graftory.hub.contents import check_file_names
from graftory.hub.depot import Depot
from graftory.hub.index import IndexRow
from graftory.hub.locate import find_hub, is_hub
from graftory.hub.records import Record
from graftory.hub.remotes.base import Foreign
from graftory.hub.resolve import resolve
from graftory.progress import Progress, silent

if TYPE_CHECKING:
    import networkx

    from graftory.hub.diff import Difference
    from graftory.hub.gc import Collected
    from graftory.hub.keys import PrivateKey, PublicKey
    from graftory.hub.report import Report
    from graftory.hub.signing import Signed
    from graftory.hub.transfer import Delivery


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
        """The adapter that a reference means, with the adapters it is composed of; every byte is hashed first.

        Raises:
            AdapterNotFoundError: If it, or one that it is composed of, is not here.
            CorruptAdapterError: If the bytes are not the recorded ones.
        """
        return self._adapter(self.record(ref))

    def put(
        self, name: str, adapter: Adapter, *, version: int | None = None, allow_nonfinite: bool = False
    ) -> AdapterRef:
        """Keep an adapter.

        Args:
            name: Name in the hub.
            adapter: What to keep: LoRA as PEFT's two files, others as `adapter.safetensors`.
            version: The version to write; by default the next one, or the one that holds the same
                adapter already.
            allow_nonfinite: Whether weights may be NaN or infinite.

        Raises:
            VersionConflictError: If `version` exists with other content.
            CorruptAdapterError: If tensors and specification disagree, or a weight is not finite.
            StorageError: If the disk is full; nothing is changed.
        """
        AdapterRef(name, version=version)
        codec = codec_of(adapter.spec)
        files = codec.encode(adapter)
        tensors = codec.check(files, adapter.spec)
        if not allow_nonfinite:
            check_finite(files)
        return self._depot.publish(name, version, adapter.spec, files, tensors)

    def add(
        self,
        folder: str | Path,
        *,
        name: str,
        version: int | None = None,
        base: BaseModel | None = None,
        fits: str | Path | None = None,
        allow_nonfinite: bool = False,
    ) -> AdapterRef:
        """Keep the adapter in a folder, byte for byte: PEFT's two files, or what `materialize` wrote.

        Args:
            folder: The folder.
            name: Name in the hub.
            version: As in `put`.
            base: The base model, where it is known better than the files tell it.
            fits: A folder with the base model; the adapter is refused if it does not fit.
            allow_nonfinite: As in `put`.

        Raises:
            DataError: If there is no such folder.
            BaseMismatchError: If it does not fit the base in `fits`.
            CorruptAdapterError: If a file is missing or breaks its format.
            UnsupportedAdapterError: If the adapter uses something graftory does not do, or is a pickle.
            VersionConflictError: If `version` exists with other content.
        """
        from graftory.hub.base_check import base_shapes, check_fits
        from graftory.hub.folders import read_folder

        AdapterRef(check_name(name), version=version)
        spec, files = read_folder(Path(folder).expanduser(), name, base)
        tensors = codec_of(spec).check(files, spec)
        if fits is not None:
            check_fits(spec, tensors, base_shapes(Path(fits).expanduser()))
        if not allow_nonfinite:
            check_finite(files)
        return self._depot.publish(name, version, spec, files, tensors)

    def check_base(self, ref: str | AdapterRef, folder: str | Path) -> None:
        """Check from the headers of its files that a base model is the one an adapter needs.

        Raises:
            BaseMismatchError: If a module is missing there or has another shape.
            DataError: If the folder holds no base model.
        """
        from graftory.hub.base_check import base_shapes, check_fits

        record = self.record(ref)
        check_fits(record.spec, record.tensors, base_shapes(Path(folder).expanduser()))

    def materialize(self, ref: str | AdapterRef, folder: str | Path) -> Path:
        """Write an adapter as a folder: its files, and `graftory.json` with the specification.

        Raises:
            AdapterNotFoundError: If the reference names nothing here.
            VersionConflictError: If the folder holds other files.
        """
        from graftory.hub.folders import write_folder

        record = self.record(ref)
        return write_folder(Path(folder).expanduser().absolute(), record.spec, self._files(record))

    def push(
        self, ref: str | AdapterRef, remote: str, *, move_aliases: bool = False, progress: Progress = silent
    ) -> Delivery:
        """Bring a version, the parents it is composed of, its aliases and signatures to a remote; the
        version number stays.

        Args:
            ref: The version.
            remote: An address (`file:///dir`, `hf://org/repo`, `s3://bucket/prefix`) or the name of one.
            move_aliases: Whether an alias of the version that means another one there is moved; by
                default it stays, and is reported.
            progress: Told of what travels.

        Raises:
            VersionConflictError: If the remote has the version with other content.
            RemoteError: If the remote cannot be reached, read or written.
        """
        from graftory.hub.named import resolve_address
        from graftory.hub.remotes.addresses import open_remote
        from graftory.hub.transfer import send

        there = open_remote(resolve_address(self._depot, remote))
        return send(self._depot, there, self.record(ref), move_aliases=move_aliases, progress=progress)

    def pull(
        self,
        remote_ref: str,
        *,
        name: str | None = None,
        base: str | Path | None = None,
        allow_nonfinite: bool = False,
        move_aliases: bool = False,
        progress: Progress = silent,
    ) -> Delivery:
        """Bring a version, the parents it is composed of, its aliases and signatures from a remote; the
        version number stays. An adapter without a record gets one, as the next version.

        Args:
            remote_ref: The remote and a reference there: `file:///dir/sst2@1`, `hf://org/repo@1`,
                `s3://bucket/prefix/sst2`, `origin/sst2:prod`.
            name: Name for an adapter without a record; by default it is made from the address.
            base: A folder with the base model; nothing is fetched if the adapter does not fit it.
            allow_nonfinite: As in `put`.
            move_aliases: As in `push`, for the aliases here.
            progress: Told of what travels.

        Raises:
            AdapterNotFoundError: If the reference names nothing there.
            CorruptAdapterError: If the bytes there are not the recorded ones; nothing is kept.
            VersionConflictError: If this hub has the version with other content.
            BaseMismatchError: If it does not fit the base.
            RemoteError: If the remote cannot be reached or read.
        """
        from graftory.hub.base_check import base_shapes, check_fits
        from graftory.hub.foreign import outline, take_in
        from graftory.hub.named import resolve_address
        from graftory.hub.remotes.addresses import split_remote_ref
        from graftory.hub.transfer import Delivery, receive

        remote, wanted = split_remote_ref(resolve_address(self._depot, remote_ref))
        item = remote.record(wanted)
        if base is not None:
            check_fits(*outline(remote, item), base_shapes(Path(base).expanduser()))
        if isinstance(item, Foreign):
            ref = take_in(self._depot, remote, item, name=name, allow_nonfinite=allow_nonfinite, progress=progress)
            return Delivery(ref, self.record(ref).digest, source=item.source)
        if name is not None and name != item.name:
            raise ConfigError(
                f"{remote_ref}: is a version of {item.name!r} and keeps its name; leave --name {name!r} out"
            )
        return receive(
            self._depot,
            remote,
            item,
            allow_nonfinite=allow_nonfinite,
            move_aliases=move_aliases,
            progress=progress,
        )

    def listing(self, remote: str) -> dict[str, tuple[int, ...]]:
        """The names and versions that a remote has.

        Raises:
            RemoteError: If the remote cannot be reached or read.
        """
        from graftory.hub.named import resolve_address
        from graftory.hub.remotes.addresses import open_remote

        return dict(open_remote(resolve_address(self._depot, remote)).listing())

    def write_layout(
        self, ref: str | AdapterRef, folder: str | Path, layout: str, *, served_base: str | None = None
    ) -> Path:
        """Write an adapter below a folder as another program wants it.

        Args:
            ref: The version.
            folder: Where its own folder is made.
            layout: `peft` or `vllm`.
            served_base: The name under which vLLM serves the base; the one in the record by default.

        Raises:
            UnsupportedAdapterError: If the program cannot take it.
            VersionConflictError: If the folder holds other files.
        """
        from graftory.hub.layouts import write_layout

        record = self.record(ref)
        target = Path(folder).expanduser().absolute()
        return write_layout(record, self._files(record), target, layout=layout, served_base=served_base)

    def verify(
        self,
        refs: Sequence[str | AdapterRef] = (),
        *,
        complete: bool = False,
        keys: Sequence[PublicKey] = (),
        progress: Progress = silent,
    ) -> Report:
        """Check every byte of some versions, or of the whole hub; what is wrong is in the report.

        Args:
            refs: The versions; everything if there are none.
            complete: Whether to list what the records lack.
            keys: Public keys, one of which must have signed each version.
            progress: Told of the bytes hashed.

        Raises:
            AdapterNotFoundError: If a reference names nothing here.
        """
        from graftory.hub.verify import verify

        return verify(self._depot, refs, complete=complete, keys=keys, progress=progress)

    def gc(self, *, dry_run: bool = False, partial_downloads: bool = False) -> Collected:
        """Remove what no version needs.

        Args:
            dry_run: Only say what would be removed.
            partial_downloads: Whether unfinished downloads of less than a day count.

        Raises:
            CorruptAdapterError: If a record is damaged; nothing is removed.
        """
        from graftory.hub.gc import KEEP_SECONDS, collect

        return collect(self._depot, dry_run=dry_run, keep_seconds=0.0 if partial_downloads else KEEP_SECONDS)

    def diff(self, left: str | AdapterRef, right: str | AdapterRef) -> Difference:
        """What differs between two versions: recorded values, metrics, tensors, LoRA updates. Raises as `get`."""
        from graftory.hub.diff import diff

        return diff(self._depot, self.record(left), self.record(right))

    def sign(self, ref: str | AdapterRef, key: PrivateKey) -> Signed:
        """Sign a version with its files and all it was made from.

        Raises:
            CorruptAdapterError: If bytes are not the recorded ones.
            SignatureError: If a parent that it is composed of is not here.
        """
        from graftory.hub.signing import sign

        return sign(self._depot, ref, key)

    def signatures(self, ref: str | AdapterRef) -> tuple[str, ...]:
        """The ids of the keys that have signed a version; whether rightly, `verify` tells."""
        found = self.resolve(ref)
        return tuple(self._depot.signatures.of(found.name, found.version or 0))

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

    def lineage(self, ref: str | AdapterRef, *, children: bool = False) -> networkx.DiGraph[str]:
        """The family of an adapter: a graph of digests.

        Nodes have `ref`, `known` and, where known, `record`; edges, from parent to child, have `relation` and
        `weight`, and `links` with all parts of one parent as pairs of these.

        Args:
            ref: The adapter.
            children: Whether to follow what was made from it as well.
        """
        from graftory.hub.lineage import lineage_graph

        return lineage_graph(self._depot, self.record(ref), children=children)

    def _adapter(self, record: Record) -> Adapter:
        files = self._files(record)
        codec = codec_of(record.spec)
        codec.check(files, record.spec)
        return Adapter(record.spec, codec.decode(files), tuple(map(self._adapter, self._sources(record))))

    def _sources(self, record: Record) -> Iterator[Record]:
        """The records of what an adapter works on when it runs."""
        for parent in record.spec.lineage.parents:
            if parent.relation == "composed":
                found = self._depot.records.find(parent.digest, parent.ref)
                if found is None:
                    raise AdapterNotFoundError(
                        f"{record.ref} is composed of {parent.ref} ({parent.digest[:19]}), which is not in this hub; "
                        "pull it, or pull the composition again, which brings its parents"
                    )
                yield found

    def _files(self, record: Record) -> dict[str, memoryview]:
        check_file_names(record)
        return {e.path: self._depot.blobs.map(e.sha256, f"{record.ref} {e.path}") for e in record.files}

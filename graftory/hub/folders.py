"""Adapters as folders of ordinary files: what `Hub.add` reads and `Hub.materialize` writes."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from graftory.adapter import Adapter, AdapterSpec, BaseModel, spec_from_json, spec_to_json
from graftory.errors import ConfigError, CorruptAdapterError, VersionConflictError
from graftory.hub import strict_json
from graftory.hub.codecs import codec_of, codec_of_folder
from graftory.hub.files import make_folder, sync_folder
from graftory.hub.safetensors_header import Bytes, header_bytes, parse_header
from graftory.schema import pretty

SIDECAR = "graftory.json"
_FORMAT = "graftory-adapter"
_SCHEMA = 1


def read_folder(folder: Path, name: str, base: BaseModel | None) -> tuple[AdapterSpec, dict[str, bytes]]:
    """The specification and the files of an adapter in a folder.

    Args:
        folder: PEFT's two files or ours, with or without `graftory.json`, or AdapterHub's, which become one of these.
        name: Name of the adapter, for what an import cannot know.
        base: The base model where the caller knows it better; what it leaves out is filled from the
            files if they name the same model.

    Raises:
        DataError: If there is no such folder.
        CorruptAdapterError: If a file is missing, breaks its format, or is a pipe, a device or a link to elsewhere.
        UnsupportedAdapterError: If the adapter uses something graftory does not do.
    """
    theirs = _adapterhub(folder, name)
    if theirs is not None:
        spec = theirs.spec if base is None else replace(theirs.spec, base=_fill(base, theirs.spec.base))
        return spec, codec_of(spec).encode(theirs)
    codec = codec_of_folder(folder)
    files = {file: _read(folder, file) for file in codec.file_names}
    sidecar = folder / SIDECAR
    if os.path.lexists(sidecar):
        spec = _read_sidecar(sidecar, _read(folder, SIDECAR))
        if codec_of(spec) is not codec:
            raise CorruptAdapterError(
                f"{sidecar}: says method {spec.method!r}, the files are of another; save both again"
            )
    else:
        spec = codec.imported_spec(files, name)
    return (replace(spec, base=_fill(base, spec.base)) if base is not None else spec), files


def _adapterhub(folder: Path, name: str) -> Adapter | None:
    """The adapter in a folder as AdapterHub writes it; None if it is another folder."""
    from graftory.hub.adapterhub import file_names_in, read

    try:
        found = {path.name for path in folder.iterdir()}
    except OSError:  # the codecs say what is wrong with it
        return None
    names = file_names_in(found)
    if not names or SIDECAR in found:
        return None
    return read({file: _read(folder, file) for file in names}, name)


def _read(folder: Path, name: str) -> bytes:
    """The bytes of a file that a stranger may have made: never a pipe or a device, never a file elsewhere, and
    never more than its format can have."""
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptAdapterError(f"{path}: is not an ordinary file; copy the adapter again")
        if not path.resolve().is_relative_to(_tree(folder)):
            raise CorruptAdapterError(f"{path}: is a link to a file outside of the folder; copy that file here (cp -L)")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix == ".safetensors":
                head = file.read(8)
                head += file.read(header_bytes(head, str(path)) - 8)
                parse_header(head, size, str(path))
                file.seek(0)
                return file.read()
            return file.read(strict_json.SMALL + 1)
    except OSError as error:
        raise CorruptAdapterError(
            f"{path}: is not an ordinary file, or cannot be read ({error.strerror}); copy the adapter again"
        ) from None
    except RuntimeError:  # a link that leads to itself, as Python before 3.13 says it
        raise CorruptAdapterError(f"{path}: is not an ordinary file but a link to itself; remove it") from None


def _tree(folder: Path) -> Path:
    """The folder that links may lead into: its own, or that of a model in the cache of the Hugging Face Hub,
    whose snapshots are links to `blobs`."""
    whole = folder.resolve()
    cached = whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--")
    return whole.parents[1] if cached else whole


def _fill(base: BaseModel, known: BaseModel) -> BaseModel:
    if base.id != known.id:
        return base
    return replace(
        known,
        revision=base.revision or known.revision,
        architecture=base.architecture or known.architecture,
        config_hash=base.config_hash or known.config_hash,
        weights_hash=base.weights_hash or known.weights_hash,
    )


def _read_sidecar(path: Path, content: bytes) -> AdapterSpec:
    data = strict_json.loads(content, str(path))
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("schema") != _SCHEMA:
        raise CorruptAdapterError(f"{path}: not a sidecar of schema {_SCHEMA}; remove it to add the adapter without")
    try:
        return spec_from_json(data.get("spec"), str(path))
    except ConfigError as error:
        raise CorruptAdapterError(f"{error}; remove {SIDECAR} to add the adapter without") from None


def write_folder(folder: Path, spec: AdapterSpec, files: Mapping[str, Bytes]) -> Path:
    """Write an adapter and its sidecar as a folder, in full or not at all; the same content again is a no-op.

    Raises:
        VersionConflictError: If the folder holds other files.
    """
    return place(folder, {**files, SIDECAR: pretty({"format": _FORMAT, "schema": _SCHEMA, "spec": spec_to_json(spec)})})


def place(folder: Path, content: Mapping[str, Bytes]) -> Path:
    """Make a folder of some files, in full or not at all; the same content again is a no-op.

    Raises:
        VersionConflictError: If the folder holds other files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if folder.is_dir() and {path.name: _bytes(path) for path in folder.iterdir()} == content:
            return folder
        raise VersionConflictError(f"{folder}: holds other files; give an empty or a new folder")
    make_folder(folder.parent)
    scratch = folder.parent / f".{folder.name}.{uuid4().hex}"
    try:
        scratch.mkdir()
        for name, data in content.items():
            (scratch / name).write_bytes(data)
        if folder.exists():
            folder.rmdir()
        scratch.replace(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None

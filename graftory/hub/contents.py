"""The last check before a record that was made elsewhere is kept: the bytes are what it says."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from graftory.errors import CorruptAdapterError, GraftoryError
from graftory.hub.codecs import codec_of
from graftory.hub.codecs.tensors import check_finite
from graftory.hub.records import Record, TensorEntry, file_entries


def check_file_names(record: Record) -> None:
    """Check that a record lists the files of its format and no others; so no path comes from outside.

    Raises:
        CorruptAdapterError: If it does not.
    """
    wanted = sorted(codec_of(record.spec).file_names)
    if [entry.path for entry in record.files] != wanted:
        raise CorruptAdapterError(f"{record.ref}: the record lists other files than {', '.join(wanted)}; it is forged")


def check_contents(record: Record, files: Mapping[str, memoryview], *, allow_nonfinite: bool = False) -> None:
    """Check hashes, formats, shapes, finite weights and the list of tensors.

    Raises:
        CorruptAdapterError: If the files are not what the record says.
        UnsupportedAdapterError: If they use something graftory does not do.
    """
    with ThreadPoolExecutor(2) as pool:  # hashes of files, hashes of their tensors and a look at each number, at once
        hashed = pool.submit(file_entries, files)
        finite = None if allow_nonfinite else pool.submit(check_finite, files)
        try:
            tensors: tuple[TensorEntry, ...] | GraftoryError = codec_of(record.spec).check(files, record.spec)
        except GraftoryError as error:
            tensors = error
    if hashed.result() != record.files:
        raise CorruptAdapterError(f"{record.ref}: the bytes are not the recorded ones; get them again")
    if isinstance(tensors, GraftoryError):
        raise tensors
    if tensors != record.tensors:
        raise CorruptAdapterError(f"{record.ref}: the record lists other tensors than its files hold; it is forged")
    if finite is not None:
        finite.result()

"""The records of a task: from files and hub data sets through `datasets`, or from a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftory.data.catalogue import in_test_part, sample_task
from graftory.data.readers import Record
from graftory.data.task import TaskFile
from graftory.errors import DataError

_Options = Mapping[str, Any]
_BUILDERS: Mapping[str, tuple[str, _Options]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""Builder of `datasets` and its options, by the end of the file's name."""


def records_of(task: TaskFile, split: str) -> Sequence[Record]:
    """The raw rows of one split, with the columns that the task names.

    Raises:
        DataError: If the data cannot be read, or has no such split or column.
        DownloadError: If sample data cannot be had.
    """
    source = task.data
    if source.sample is not None:
        records: Sequence[Record] = sample_task(source.sample).records(split)
    elif source.dataset is not None:
        records = _from_hub(task, getattr(source, split, None) or split)
    else:
        records = _from_files(task, split)
    wanted = [column for column in (task.text, task.pair, task.label, task.target) if column is not None]
    for column in wanted if records else ():
        if column not in records[0]:
            there = ", ".join(map(str, records[0]))
            raise DataError(
                f"task {task.name!r}: the {split} data has no column {column!r}; it has {there}; name one of these"
            )
    return records


def _from_files(task: TaskFile, split: str) -> Sequence[Record]:
    source = task.data
    file = getattr(source, split, None)
    if file is not None and (split != "train" or source.holdout is None):
        return _from_file(task, Path(file))
    if source.holdout is None or source.train is None or split not in ("train", "test"):
        known = ("train", "validation", "test")
        there = ", ".join(name for name in known if getattr(source, name) is not None)
        raise DataError(
            f"task {task.name!r} has no {split!r} split; it has {there}; add data.{split}, or data.holdout: 0.2"
        )
    share = source.holdout
    records = _from_file(task, Path(source.train))
    if records and task.text not in records[0]:
        return records
    return [record for record in records if in_test_part(str(record[task.text]), share) == (split == "test")]


def _from_file(task: TaskFile, path: Path) -> Sequence[Record]:
    if path.suffix not in _BUILDERS:
        raise DataError(f"task {task.name!r}: cannot read {path.name!r}; wanted {', '.join(_BUILDERS)}")
    if not path.is_file():
        raise DataError(f"task {task.name!r}: no data file {str(path)!r}; paths are relative to the task's YAML")
    builder, options = _BUILDERS[path.suffix]
    if builder == "csv":  # cells as they stand: the text 007 is not the number 7
        columns = (task.text, task.pair, task.label, task.target)
        options = {**options, "converters": {column: str for column in columns if column is not None}}
    with _quiet():
        return _load(task, path.name, builder, {"data_files": str(path), "split": "train", **options})


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a local file, which is read in no time; a download from the hub keeps its bar."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _from_hub(task: TaskFile, split: str) -> Sequence[Record]:
    source = task.data
    arguments = {"name": source.config, "revision": source.revision, "split": split}
    return _load(task, str(source.dataset), str(source.dataset), arguments)


def _load(task: TaskFile, shown: str, builder: str, arguments: _Options) -> Sequence[Record]:
    """Call `datasets` and turn what it raises (dozens of types, of its own and of its readers) into one line."""
    import datasets

    try:
        table = datasets.load_dataset(builder, **arguments)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"task {task.name!r}: cannot read {shown!r} ({reason:.160}); check the id, split or file, and the network"
        ) from error
    return [dict(record) for record in _named_labels(table, task.label)]


def _named_labels(table: Any, column: str | None) -> Any:
    """Label numbers that the data set itself names (`ClassLabel`) become those names."""
    feature = table.features.get(column)
    if not hasattr(feature, "int2str"):
        return table
    names = feature.names
    return [{**row, column: names[row[column]] if row[column] >= 0 else None} for row in table]

"""The rows of a task: inputs and targets, whatever the data came from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftory.adapter import TaskInfo, TaskKind
from graftory.data.files import records_of
from graftory.data.readers import Record
from graftory.data.task import TaskFile
from graftory.errors import DataError
from graftory.schema import canonical

Text = str | tuple[str, str]
Target = int | float | str


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs with their targets: label numbers, numbers or texts, as the kind of the task says."""

    split: str
    texts: tuple[Text, ...]
    targets: tuple[Target, ...]
    labels: tuple[str, ...] = ()
    """Label names in the order of the label numbers (classification)."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def hash(self) -> str:
        """sha256 over the rows in their canonical form; goes into the lineage."""
        data = {"labels": self.labels, "targets": self.targets, "texts": self.texts}
        return f"sha256:{hashlib.sha256(canonical(data)).hexdigest()}"

    def info(self, task: TaskFile) -> TaskInfo:
        """What an adapter trained on these rows does; the head's modules are filled in by the adapter."""
        return TaskInfo(task.name, task.kind, self.labels, (), task.max_length, task.template)

    def subsample(self, limit: int, seed: int) -> Rows:
        """At most `limit` rows in their order, the same for the same seed; a smaller limit gives a subset."""
        return self._of(sorted(self._drawn(seed)[:limit]))

    def shuffled(self, seed: int) -> Rows:
        """All rows in the order in which they are drawn: the first n are those of `subsample(n, seed)`."""
        return self._of(self._drawn(seed))

    def _drawn(self, seed: int) -> list[int]:
        return sorted(range(len(self)), key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())

    def _of(self, rows: Sequence[int]) -> Rows:
        texts = tuple(self.texts[row] for row in rows)
        return Rows(self.split, texts, tuple(self.targets[row] for row in rows), self.labels)


def load_rows(task: TaskFile, split: str, *, limit: int | None = None, seed: int = 0) -> Rows:
    """Load one split of a task.

    Labels are the names in the task file, else the sorted names found in the training split. Where the
    file names them, the data may also hold their numbers. Of a text-to-text task they are words, and its targets too.

    Raises:
        DataError: If the data cannot be read, has no such split or column, or a row has no usable value.
        DownloadError: If sample data cannot be had.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: got {limit}, wanted 1 or more rows")
    records = records_of(task, split)
    labels = _labels(task, split, records) if task.kind == "classification" else ()
    texts = tuple(_text(task, split, number, record) for number, record in enumerate(records, 1))
    read = _TARGETS[task.kind](task, labels)
    targets = tuple(_target(task, split, number, record, read) for number, record in enumerate(records, 1))
    if not texts:
        raise DataError(f"task {task.name!r}: the {split} split has no rows")
    rows = Rows(split, texts, targets, labels)
    return rows if limit is None else rows.subsample(limit, seed)


def _labels(task: TaskFile, split: str, records: Sequence[Record]) -> tuple[str, ...]:
    if task.labels:
        return task.labels
    training = records if split == "train" else records_of(task, "train")
    return tuple(sorted({str(value) for value in _column(training, str(task.label)) if _is_given(value)}))


def _column(records: Iterable[Record], name: str) -> Iterable[object]:
    return (record[name] for record in records)


def _text(task: TaskFile, split: str, number: int, record: Record) -> Text:
    cells = [record[column] for column in (task.text, task.pair) if column is not None]
    if any(cell is None for cell in cells):
        raise DataError(f"task {task.name!r}: row {number} of {split} has no text; fill it in or leave the row out")
    first, *second = (str(cell) for cell in cells)
    return (first, second[0]) if second else first


def _target(task: TaskFile, split: str, number: int, record: Record, read: Callable[[object], Target | None]) -> Target:
    column = str(task.label or task.target)
    value = record[column]
    target = read(value) if _is_given(value) else None
    if target is None:
        wanted = "one of its labels" if task.labels else _WANTED[task.kind]
        raise DataError(
            f"task {task.name!r}: row {number} of {split} has {value!r:.60} in column {column!r}, wanted {wanted}"
        )
    return target


def _is_given(value: object) -> bool:
    return value is not None and value != ""


def _read_label(_: TaskFile, labels: tuple[str, ...]) -> Callable[[object], Target | None]:
    numbers = {name: number for number, name in enumerate(labels)}
    by_number = {str(number): number for number in range(len(labels))}

    def read(value: object) -> int | None:
        name = str(value)
        return numbers.get(name, by_number.get(name))

    return read


def _read_number(_: TaskFile, __: tuple[str, ...]) -> Callable[[object], Target | None]:
    def read(value: object) -> float | None:
        try:
            number = float(str(value))
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    return read


def _read_text(task: TaskFile, _: tuple[str, ...]) -> Callable[[object], Target | None]:
    if not task.labels:
        return str
    number_of = _read_label(task, task.labels)

    def read(value: object) -> str | None:
        number = number_of(value)
        return None if number is None else task.labels[int(number)]

    return read


_WANTED: Mapping[TaskKind, str] = {
    "classification": "one of its labels",
    "regression": "a number",
    "causal_lm": "a text",
    "seq2seq": "a text",
}
_TARGETS: Mapping[TaskKind, Callable[[TaskFile, tuple[str, ...]], Callable[[object], Target | None]]] = {
    "classification": _read_label,
    "regression": _read_number,
    "causal_lm": _read_text,
    "seq2seq": _read_text,
}

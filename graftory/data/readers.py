"""Small readers of the sample files: a path to records with the columns `text`, `pair`, `label`, `target`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Record = Mapping[str, object]
_LONGEST_FIELD = 1 << 24


def read_csv(
    path: Path,
    *,
    columns: Mapping[str, str],
    names: Mapping[str, str] | None = None,
    keep: tuple[str, str] | None = None,
    encoding: str = "utf-8",
) -> Iterator[Record]:
    """Rows of a CSV file with a header.

    Args:
        path: The file.
        columns: Our column -> the file's.
        names: The file's label -> label name.
        keep: A column and the value that a row must have there.
        encoding: Of the file.
    """
    with path.open(encoding=encoding, newline="") as file:
        kept = (row for row in csv.DictReader(file) if keep is None or row[keep[0]] == keep[1])
        yield from _records(kept, columns, names)


def read_jsonl(path: Path, *, columns: Mapping[str, str], names: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Rows of a JSON Lines file whose lines are objects; rows without a label are left out."""
    with path.open(encoding="utf-8") as file:
        yield from _records(map(json.loads, file), columns, names)


def read_json_lists(path: Path, *, columns: tuple[str, ...]) -> Iterator[Record]:
    """Rows of a JSON Lines file whose lines are lists."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield dict(zip(columns, json.loads(line), strict=True))


def read_tab(path: Path) -> Iterator[Record]:
    """Rows of Orange's .tab format: three header lines, then label and text."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))[3:]
    finally:
        csv.field_size_limit(limit)
    for row in rows:
        if len(row) == 2 and row[1]:
            yield {"label": row[0], "text": row[1]}


def read_similarity(path: Path) -> Iterator[Record]:
    """Rows of the STS benchmark: tab separated, unquoted; score, sentence and sentence are columns 4, 5 and 6."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            cells = line.rstrip("\n").split("\t")
            yield {"label": float(cells[4]), "text": cells[5], "pair": cells[6]}


def read_valence(path: Path) -> Iterator[Record]:
    """Rows of the VADER ground truth as two classes, by the sign of the mean rating; neutral rows are left out."""
    with path.open(encoding="utf-8") as file:
        next(file)
        for line in file:
            cells = line.rstrip("\n").split("\t")
            if len(cells) == 3 and float(cells[1]) != 0:
                yield {"label": "positive" if float(cells[1]) > 0 else "negative", "text": cells[2]}


def _records(
    rows: Iterable[Mapping[str, object]], columns: Mapping[str, str], names: Mapping[str, str] | None
) -> Iterator[Record]:
    for row in rows:
        record = {ours: row.get(theirs) for ours, theirs in columns.items()}
        if names is not None:
            if record["label"] is None:
                continue
            record["label"] = names[str(record["label"])]
        yield record

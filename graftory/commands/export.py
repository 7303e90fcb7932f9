"""`hub export`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.commands.output import json_option, print_json, working
from graftory.commands.recorded import TASK_SOURCE
from graftory.data import Text, load_rows, load_task
from graftory.errors import ConfigError, DataError, MergeError

if TYPE_CHECKING:
    from graftory.adapter import TaskInfo
    from graftory.hub import Record

TOLERANCE = 1e-3
"""Largest difference of logits that an export may have; rounding alone stays far below it in fp32."""


@click.command("export")
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", help="The base model. [default: the recorded one]")
@click.option("--head", metavar="REF", help="Adapter to take task and head from, where REF is merged and has none.")
@click.option(
    "--input",
    "file",
    type=click.Path(path_type=Path),
    help="File of texts, one a line, to compare on. [default: test rows of the recorded task]",
)
@click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Texts to compare on.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    ref: str,
    folder: Path,
    base: str | None,
    head: str | None,
    file: Path | None,
    rows: int,
    as_json: bool,
) -> None:
    """Fold an adapter into its base and save one plain model.

    The saved model is loaded again with plain transformers and its logits are compared with those of
    base + adapter on real inputs; the largest difference is printed, and above 1e-3 nothing is kept.

    \b
    Example:
      hub export trec@1 trec-model
      hub export trec@1 trec-model --input questions.txt --json
    """
    from graftory.adapters import attach
    from graftory.compose import export, save_export, verify_export
    from graftory.hub import Hub
    from graftory.training import load_base

    hub = Hub.open(registry)
    record = hub.record(ref)
    meaning = hub.record(head) if head else record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; give a new one")
    if meaning.spec.task is None:
        raise ConfigError(f"{record.ref} has no task of its own; pass --head with the adapter whose task is meant")
    texts = texts_to_compare(meaning, file, rows)
    adapter, source = hub.get(ref), hub.get(head) if head else None
    with working(f"loading {base or record.spec.base.id}"):
        loaded = load_base(base or record.spec.base.id, meaning.spec.task.kind)
    with working("folding and saving"):
        save_export(export(loaded.model, adapter, head=source), loaded.tokenizer, folder, adapter=adapter)
    try:
        with working(f"comparing on {len(texts)} texts"):
            again = type(loaded.model).from_pretrained(folder)
            attached = {"exported": adapter} | ({"head": source} if source else {})
            adapted = attach(loaded.model, attached)
            batches = batches_of(loaded, meaning.spec.task, texts)
            check = verify_export(adapted, again, batches, name="exported", head="head" if source else None)
        if not check.max_difference <= TOLERANCE:
            raise MergeError(
                f"{record.ref}: the saved model differs from base + adapter by {check.max_difference:.2e}, wanted "
                f"{TOLERANCE} or less; nothing was kept; load the base in fp32 and export again"
            )
    except BaseException:
        shutil.rmtree(folder)
        raise
    if as_json:
        print_json({"folder": str(folder), "max_difference": check.max_difference, "rows": check.n})
    else:
        click.echo(f"exported {record.ref} to {folder}")
        click.echo(f"largest difference of logits on {check.n} inputs: {check.max_difference:.2e}")


def texts_to_compare(record: Record, file: Path | None, rows: int) -> tuple[Text, ...]:
    """Real inputs: lines of a file, or test rows of the task the adapter was trained on.

    Raises:
        DataError: If the file cannot be read or is empty.
        ConfigError: If there is no file and the task is not recorded.
    """
    if file is not None:
        return texts_of(file)[:rows]
    source = record.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(f"{record.ref} does not say which task it was trained on; pass --input with a file of texts")
    return load_rows(load_task(source), "test", limit=rows).texts


def texts_of(file: Path) -> tuple[Text, ...]:
    """The lines of a file; a tab parts the two texts of a pair.

    Raises:
        DataError: If it cannot be read or has no lines.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"cannot read {str(file)!r} ({reason}); give a text file with one text a line") from None
    if not lines:
        raise DataError(f"{str(file)!r} has no lines; give a text file with one text a line")
    return tuple((first, second) if tab else first for first, tab, second in (line.partition("\t") for line in lines))

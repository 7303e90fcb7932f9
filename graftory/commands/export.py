"""`hub export`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.adapter import TASK_SOURCE
from graftory.commands.export_formats import FORMATS
from graftory.commands.output import json_option, print_json, working
from graftory.commands.texts import texts_of
from graftory.data import Text, load_rows, load_task
from graftory.errors import ConfigError, MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from graftory.adapter import TaskInfo
    from graftory.hub import Record
    from graftory.training import LoadedBase

Input = tuple[Text, int | float | str]
"""A text and its target."""
BATCH_SIZE = 16

TOLERANCE = 1e-3
"""Largest difference of logits that an export may have; rounding alone stays far below it in fp32."""


@click.command("export")
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["model", *FORMATS]),
    default="model",
    show_default=True,
    help="What is written: one plain model, or the adapter alone in the files of another library.",
)
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
    form: str,
    base: str | None,
    head: str | None,
    file: Path | None,
    rows: int,
    as_json: bool,
) -> None:
    """Fold an adapter into its base and save one plain model, or write its files for another library.

    The saved model is loaded again with plain transformers and its logits are compared with those of
    base + adapter on real inputs; the largest difference is printed, and above 1e-3 nothing is kept.

    \b
    Example:
      hub export trec@1 trec-model
      hub export trec@1 trec-model --input questions.txt --json
      hub export trec@1 trec-adapter --format adapterhub
    """
    from graftory.adapters import attach
    from graftory.compose import export, save_export, verify_export
    from graftory.hub import Hub
    from graftory.training import load_base
    from graftory.training.base import quiet

    hub = Hub.open(registry)
    record = hub.record(ref)
    meaning = hub.record(head) if head else record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; give a new one")
    if form in FORMATS:
        written = FORMATS[form](hub, record, folder, base or record.spec.base.id)
        if as_json:
            print_json({"folder": str(written), "format": form})
        else:
            click.echo(f"wrote {record.ref} to {written}, for {form}")
        return
    if meaning.spec.task is None:
        raise ConfigError(f"{record.ref} has no task of its own; pass --head with the adapter whose task is meant")
    inputs = inputs_to_compare(meaning, file, rows)
    adapter, source = hub.get(ref), hub.get(head) if head else None
    with working(f"loading {base or record.spec.base.id}"):
        loaded = load_base(base or record.spec.base.id, meaning.spec.task.kind)
    with working("folding and saving"), quiet():
        save_export(export(loaded.model, adapter, head=source), loaded.tokenizer, folder, adapter=adapter)
    try:
        with working(f"comparing on {len(inputs)} inputs"), quiet():
            again = type(loaded.model).from_pretrained(folder)
            attached = {"exported": adapter} | ({"head": source} if source else {})
            adapted = attach(loaded.model, attached)
            batches = batches_of(loaded, meaning.spec.task, inputs)
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


def inputs_to_compare(record: Record, file: Path | None, rows: int) -> list[Input]:
    """Real inputs: lines of a file, or test rows of the task the adapter was trained on.

    Raises:
        DataError: If the file cannot be read or is empty.
        ConfigError: If there is no file and the task is not recorded.
    """
    if file is not None:
        return [(text, "") for text in texts_of(file)[:rows]]
    source = record.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(f"{record.ref} does not say which task it was trained on; pass --input with a file of texts")
    chosen = load_rows(load_task(source), "test", limit=rows)
    return list(zip(chosen.texts, chosen.targets, strict=True))


def batches_of(loaded: LoadedBase, task: TaskInfo, inputs: Sequence[Input]) -> Iterator[dict[str, Tensor]]:
    """Inputs as the model takes them; a sequence-to-sequence model also needs what its decoder reads."""
    from graftory.training.encode import Collator, encode

    collator = Collator(loaded.tokenizer.pad_token_id)
    for start in range(0, len(inputs), BATCH_SIZE):
        part = inputs[start : start + BATCH_SIZE]
        yield collator(
            [encode(loaded.tokenizer, task, text, y if task.kind == "seq2seq" else None) for text, y in part]
        )

"""`hub predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftory.commands.output import json_option, print_json, print_table, working
from graftory.commands.recorded import runnable
from graftory.commands.texts import texts_of
from graftory.data import Text
from graftory.errors import ConfigError
from graftory.schema import Json

if TYPE_CHECKING:
    from graftory.training import Prediction


def with_texts(run: Any) -> Any:
    """Give a command the texts that it is to answer; `inputs_of` reads them."""
    for option in (
        click.option(
            "--pair", "pairs", multiple=True, help="Second text of a TEXT, in the same order; may be repeated."
        ),
        click.option(
            "--file",
            type=click.Path(path_type=Path),
            help="File of texts, one a line; a tab parts the two texts of a pair.",
        ),
        click.argument("texts", metavar="TEXT...", nargs=-1),
    ):
        run = option(run)
    return run


@click.command("predict")
@click.argument("ref")
@with_texts
@click.option("--head", metavar="REF", help="Adapter to take the head from, where REF is merged and has none.")
@click.option("--task", "task_name", metavar="NAME", help="Which task of a hyperformer is meant.")
@click.option("--base", help="The base model. [default: the recorded one]")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    ref: str,
    texts: tuple[str, ...],
    file: Path | None,
    pairs: tuple[str, ...],
    head: str | None,
    task_name: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """Answer texts with an adapter.

    Prints the label and its probability for a classification, the value for a regression, the text
    that a language model writes.

    \b
    Example:
      hub predict trec "How far is the moon?"
      hub predict snli "A man sleeps." --pair "Nobody is awake."
      hub predict trec:prod --file questions.txt --json
    """
    from graftory.hub import Hub
    from graftory.training import Query, load_base, predict

    inputs = inputs_of(texts, pairs, file)
    hub = Hub.open(registry)
    adapter, other = runnable(hub.get(ref), task_name), hub.get(head) if head else None
    task = (other or adapter).spec.task
    if task is None:
        raise ConfigError(
            f"{hub.resolve(ref)} has no task of its own; pass --head with the adapter whose task is meant"
        )
    with working(f"loading {base or adapter.spec.base.id}"):
        loaded = load_base(base or adapter.spec.base.id, task.kind)
    with working(f"predicting {len(inputs)} texts"):
        predictions = predict(loaded, [Query(text, adapter, other) for text in inputs])
    if as_json:
        print_json([{"text": text, **answer(row)} for text, row in zip(inputs, predictions, strict=True)])
        return
    shown = [answer(row) for row in predictions]
    columns = [key for key in shown[0] if key != "probabilities"]
    print_table(
        (*columns, "text"),
        [(*(cell(row[key]) for key in columns), cell(text)) for text, row in zip(inputs, shown, strict=True)],
    )


def inputs_of(texts: tuple[str, ...], pairs: tuple[str, ...], file: Path | None) -> tuple[Text, ...]:
    """The texts to answer, from the command line or a file.

    Raises:
        ConfigError: If there are none, or from both, or pairs do not match.
        DataError: If the file cannot be read.
    """
    if bool(texts) == bool(file):
        raise ConfigError("give either TEXT... or --file FILE")
    if file is not None:
        return texts_of(file)
    if pairs and len(pairs) != len(texts):
        raise ConfigError(f"got {len(texts)} texts and {len(pairs)} --pair, wanted one --pair for each text")
    return tuple(zip(texts, pairs, strict=True)) if pairs else texts


def answer(row: Prediction) -> dict[str, Json]:
    """What a prediction says, by name; only what its kind of task has."""
    if row.label is not None and row.probabilities is not None:
        probability = row.probabilities[row.label]
        return {"label": row.label, "probability": probability, "probabilities": row.probabilities}
    if row.label is not None:
        return {"label": row.label}
    return {"value": row.value} if row.value is not None else {"written": row.text}


def cell(value: object) -> str:
    """A value in one cell of a table."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return " | ".join(value) if isinstance(value, tuple) else str(value)

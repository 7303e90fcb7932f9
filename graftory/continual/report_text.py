"""A report as people read it: the same blocks as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftory.continual.general import General, general_rows, nats, perplexity
from graftory.continual.metrics import Summary
from graftory.continual.report import Report, Routing

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a report: a heading, and below it a text, a table or a picture; whatever is given."""

    heading: str = ""
    text: str = ""
    rows: Sequence[Row] = ()
    picture: str = ""
    """Name of its file; the heading is its title."""


def compare_runs(reports: Sequence[Report]) -> list[dict[str, str]]:
    """A table of runs: one row per run and way to know the task, values ready to print, – where there is none."""
    rows = []
    for report in reports:
        known = "given" if report.id_known else "not needed"
        row = {"run": report.name, "strategy": report.strategy, "task id": known, **_numbers(report.summary)}
        rows.append({**row, "stored": kilobytes(sum(report.storage[-1].values())) if report.storage else "–"})
        if report.losses:
            rows[-1] |= {"loss": f"{sum(report.losses[-1]) / len(report.tasks):.3f}"}
        if report.general is not None:
            rows[-1] |= _general_cells(report.general, report.general.given[-1])
        if report.routing is not None:
            routed = {**dict.fromkeys(row, "–"), "run": report.name, "strategy": report.strategy, "task id": "router"}
            numbers = {
                "ACC": percent(report.routing.acc),
                "regret": points(report.routing.regret),
                "right task": percent(report.routing.id_accuracy),
                "abstained": percent(report.routing.abstained),
            }
            if report.general is not None and report.general.routed is not None:
                numbers |= _general_cells(report.general, report.general.routed[-1])
            rows.append({**routed, **numbers})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{column: row.get(column, "–") for column in columns} for row in rows]


def blocks_of(report: Report, pictures: Mapping[str, str]) -> list[Block]:
    """What a report tells, in order.

    Args:
        report: The report.
        pictures: Titles by file name.
    """
    blocks = [
        Block(rows=compare_runs([report])),
        Block(text="Scores in %, differences in points, storage in kB. Formulas: docs/continual.md."),
        Block("Tasks", rows=_task_rows(report)),
    ]
    if report.routing is not None:
        blocks.append(Block("Where the router sent the rows", rows=_confusion_rows(report, report.routing)))
    if report.losses:
        about = "Nats per token of the right answers; lower is better. Rows: after training; columns: measured on."
        blocks.append(Block("Loss", about, _loss_rows(report)))
    if report.general is not None:
        blocks.append(Block("General text", _about(report.general), general_rows(report.general, report.tasks)))
    if report.rejected:
        bound = (
            f"More than {percent(report.max_drop or 0)} points below the last accepted step; that one stays in force."
        )
        blocks.append(Block("Rejected by the gate", bound, _rejected_rows(report)))
    if report.storage:
        blocks.append(Block("Stored after each step, kB", rows=_storage_rows(report)))
    return [*blocks, *(Block(title, picture=name) for name, title in pictures.items())]


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    parts = [f"# {title}"]
    for block in blocks:
        if block.picture:
            parts.append(f"![{block.heading}]({block.picture})")
            continue
        parts += [f"## {block.heading}"] if block.heading else []
        parts += [block.text] if block.text else []
        parts += ["\n".join(table(block.rows))] if block.rows else []
    return "\n\n".join(parts) + "\n"


def page(title: str, blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """The blocks as one HTML file with the pictures in it, which needs no other file and runs no script."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        if block.picture:
            data = base64.b64encode(images[block.picture]).decode()
            parts.append(f'<img alt="{html.escape(block.heading)}" src="data:image/png;base64,{data}">')
            continue
        parts += [f"<h2>{html.escape(block.heading)}</h2>"] if block.heading else []
        parts += [f"<p>{html.escape(block.text)}</p>"] if block.text else []
        parts += [_html_table(block.rows)] if block.rows else []
    body = "\n".join(parts)
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n{_STYLE}\n{body}\n'


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as a Markdown table."""
    head = list(rows[0])
    body = ["| " + " | ".join(row[column] for column in head) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def percent(value: float) -> str:
    """0.8075 as 80.8."""
    return f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference in points, with its sign; exactly 0 is told apart from what rounds to it."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{100 * value:+.2f}"


def kilobytes(count: int) -> str:
    """1500 as 1.5."""
    return f"{count / 1000:.1f}"


_STYLE = (
    "<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:left}"
    "img{max-width:100%;display:block;margin:1em 0}</style>"
)


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{html.escape(row[name])}</td>" for name in rows[0]) for row in rows]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _task_rows(report: Report) -> list[dict[str, str]]:
    return [
        {
            "task": result.name,
            "metric": result.metric,
            "training rows": str(result.train_rows),
            "test rows": str(result.test_rows),
            "untrained": percent(result.untrained),
            "after its training": percent(report.matrix[j][j]),
            "at the end": percent(report.matrix[-1][j]),
            **({} if report.routing is None else {"routed": _percent_or_dash(report.routing.matrix[-1][j])}),
            "adapter": result.ref,
        }
        for j, result in enumerate(report.results)
    ]


def _confusion_rows(report: Report, routing: Routing) -> list[dict[str, str]]:
    names = (*report.tasks, "base (abstained)")
    return [
        {"rows of": task, **{name: str(count) for name, count in zip(names, counts, strict=True)}}
        for task, counts in zip(report.tasks, routing.confusion, strict=True)
    ]


def _rejected_rows(report: Report) -> list[dict[str, str]]:
    return [
        {
            "step": str(each.step),
            "task": each.task,
            "adapter": each.ref,
            "fell most": each.fell,
            "drop": points(-each.drop),
            "its own task": percent(each.scores[each.step - 1]),
        }
        for each in report.rejected
    ]


def _loss_rows(report: Report) -> list[dict[str, str]]:
    return [
        {"after": task, **{name: f"{loss:.3f}" for name, loss in zip(report.tasks, row, strict=True)}}
        for task, row in zip(report.tasks, report.losses, strict=True)
    ]


def _about(general: General) -> str:
    several = "; mean over the adapters of the tasks learnt so far" if general.worst != general.given else ""
    return (
        f"Loss in nats per token, and perplexity, on {general.texts} held-out texts ({general.tokens} tokens) that "
        f"belong to no task{several}. A change above 0 is ability that the adapter in force takes from the base."
    )


def _general_cells(general: General, loss: float) -> dict[str, str]:
    return {"perplexity of general text": f"{perplexity(loss)} ({nats(loss - general.base)})"}


def _storage_rows(report: Report) -> list[dict[str, str]]:
    kinds = sorted({kind for step in report.storage for kind in step})
    return [
        {
            "after": task,
            **{kind: kilobytes(step.get(kind, 0)) for kind in kinds},
            "together": kilobytes(sum(step.values())),
        }
        for task, step in zip(report.tasks, report.storage, strict=True)
    ]


def _numbers(summary: Summary) -> dict[str, str]:
    return {
        "ACC": percent(summary.acc),
        "AAA": percent(summary.aaa),
        "BWT": points(summary.bwt),
        "forgetting": points(summary.forgetting),
        "FWT": points(summary.fwt),
    }


def _percent_or_dash(value: float | None) -> str:
    return "–" if value is None else percent(value)

"""What `merging_accuracy.py` measures, by name, and the table of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS: Mapping[str, str] = {
    "trec": "questions",
    "sms": "spam",
    "disaster": "disaster",
    "rotten-tomatoes": "sentiment",
    "valence-movie": "sentiment",
    "valence-tweets": "sentiment",
}
RANKS: Mapping[str, Sequence[int]] = {"equal": (16,) * 6, "mixed": (4, 8, 16, 4, 8, 16)}
BUDGETS: Mapping[str, int | None] = {"full": None, "rank 16": 16}
SINGLE = "best single"
PEFTS = "PEFT "
NEED_DATA = ("regmean", "fisher", "adamerging", "auto")
"""Rows that look at inputs or rows of the tasks."""


@dataclass(frozen=True, slots=True)
class CaseKey:
    """What is merged, and to what, by name."""

    seed: int
    ranks: str
    budget: str
    names: tuple[str, ...]

    def of(self, row: str) -> str:
        """What a measurement of it is stored under."""
        return f"{self.seed}|{self.ranks}|{self.budget}|{'+'.join(self.names)}|{row}"

    def alone(self, adapter: str, task: str) -> str:
        """The same of an adapter that is not merged, on a task."""
        return f"{self.seed}|{self.ranks}|alone|{adapter}|{task}"


class Kept:
    """Figures in a file, a line each, by key."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.figures: dict[str, dict[str, Any]] = {one["key"]: one for one in map(json.loads, lines)}

    def add(self, key: str, **figures: Any) -> None:
        """Keep one."""
        self.figures[key] = {"key": key, **figures}
        with self._file.open("a") as file:
            file.write(json.dumps(self.figures[key]) + "\n")


Scores = Mapping[CaseKey, float]
"""Normalised, in percent."""


def normalised(kept: Kept, key: CaseKey, values: Mapping[str, float]) -> float:
    """The mean over tasks of a score by the own adapter's, in percent."""
    alone: dict[str, float] = {name: kept.figures[key.alone(name, name)]["value"] for name in values}
    return 100 * statistics.mean(value / alone[name] for name, value in values.items())


def best_single(kept: Kept, key: CaseKey) -> float:
    """The normalised score of the adapter that is best for all tasks of a case, chosen by hindsight."""
    return max(
        normalised(kept, key, {task: kept.figures[key.alone(name, task)]["value"] for task in key.names})
        for name in key.names
    )


def scores_of(kept: Kept, row: str, keys: Sequence[CaseKey]) -> Scores:
    """A row's scores where it has been measured; a result of a larger rank than asked for is none."""
    found = {key: kept.figures[key.of(row)] for key in keys if key.of(row) in kept.figures}
    return {
        key: normalised(kept, key, one["values"])
        for key, one in found.items()
        if "values" in one and not (BUDGETS[key.budget] and one["rank"] > (BUDGETS[key.budget] or 0))
    }


def group_of(key: CaseKey) -> str:
    """The column of the table that a case counts in."""
    domains = {DOMAINS[name] for name in key.names}
    what = "all" if len(key.names) > 2 else "same domain" if len(domains) == 1 else "cross-domain"
    return f"{what}, {key.ranks}, {key.budget}"


def summary(kept: Kept, keys: Sequence[CaseKey], rows: Sequence[str]) -> dict[str, Any]:
    """Mean ± std over seeds of every row by kind of case; nothing where it refused or not all cases are there."""
    measured = [key for key in keys if any(key.of(row) in kept.figures for row in rows)]
    scores = {SINGLE: {key: best_single(kept, key) for key in measured}}
    tried = [row for row in rows if any(key.of(row) in kept.figures for key in measured)]
    scores |= {row: dict(scores_of(kept, row, measured)) for row in tried}
    groups = {group: [key for key in measured if group_of(key) == group] for group in map(group_of, measured)}
    table = {
        row: {g: spread_of(own, cases) if all(key in own for key in cases) else None for g, cases in groups.items()}
        for row, own in scores.items()
    }
    return {
        "cases": {group: len(cases) for group, cases in groups.items()},
        "table": table,
        "margin": {
            f"{ranks} ranks, {what}": one
            for ranks in RANKS
            for what, one in margin_of(scores, [key for key in measured if key.ranks == ranks]).items()
        },
        "auto": {
            f"{ranks} ranks, {what}": value
            for ranks in RANKS
            for what, value in auto_figures(kept, scores, [key for key in measured if key.ranks == ranks]).items()
        },
    }


def spread_of(own: Scores, cases: Sequence[CaseKey]) -> tuple[float, float]:
    """Mean over cases, and standard deviation over seeds of the mean over a seed's cases."""
    seeds = sorted({key.seed for key in cases})
    means = [statistics.mean(own[key] for key in cases if key.seed == seed) for seed in seeds]
    return statistics.mean(own[key] for key in cases), statistics.stdev(means) if len(means) > 1 else 0.0


def margin_of(scores: Mapping[str, Scores], keys: Sequence[CaseKey]) -> dict[str, Any]:
    """At rank 16: our best row by the mean over the cases, PEFT's best, with and without what needs data, and the mean
    paired difference with its standard error.
    """
    cases = [key for key in keys if BUDGETS[key.budget] is not None]
    if not cases:
        return {}

    def best(rows: Sequence[str]) -> str | None:
        whole = [row for row in rows if all(key in scores[row] for key in cases)]
        return max(whole, key=lambda row: statistics.mean(scores[row][key] for key in cases), default=None)

    names = [row for row in scores if row != SINGLE]
    own = [row for row in names if not row.startswith(PEFTS)]
    theirs = best([row for row in names if row.startswith(PEFTS)])
    found = {}
    for what, row in (("best", best(own)), ("best without data", best([r for r in own if r not in NEED_DATA]))):
        if row is None or theirs is None:
            continue
        gaps = [scores[row][key] - scores[theirs][key] for key in cases]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        found[what] = {"ours": row, "PEFT": theirs, "points": statistics.mean(gaps), "error": error, "cases": len(gaps)}
    return found


def auto_figures(kept: Kept, scores: Mapping[str, Scores], keys: Sequence[CaseKey]) -> dict[str, float]:
    """What there is to say of `auto` on some cases."""
    own = {row: {key: one[key] for key in keys if key in one} for row, one in scores.items()}
    return auto_summary(own) | kept_alone(kept, keys)


def auto_summary(scores: Mapping[str, Scores]) -> dict[str, float]:
    """How near `auto` comes to the best of our methods and to the best single adapter, all of them by hindsight.

    The best of each merge is that of the same few test rows, so that their chance is against `auto`.
    """
    others = [own for row, own in scores.items() if row not in ("auto", SINGLE) and not row.startswith(PEFTS) and own]
    if not scores.get("auto") or not others:
        return {}
    whole = [own for own in others if all(key in own for key in scores["auto"])]
    usual = max(whole, key=lambda own: statistics.mean(own[key] for key in scores["auto"]))
    gaps = [usual[key] - one for key, one in scores["auto"].items()]
    short = [max(own[key] for own in others if key in own) - one for key, one in scores["auto"].items()]
    below = [scores[SINGLE][key] - one for key, one in scores["auto"].items()]
    return {
        "share within a point of the method that is best on the mean, or above": statistics.mean(
            float(gap <= 1) for gap in gaps
        ),
        "share within a point of the best of each merge": statistics.mean(float(gap <= 1) for gap in short),
        "mean points below the best of each merge": statistics.mean(short),
        "share within a point of the best single, or above": statistics.mean(float(gap <= 1) for gap in below),
        "most points below the best single": max(below),
    }


def kept_alone(kept: Kept, keys: Sequence[CaseKey]) -> dict[str, float]:
    """How often `auto` keeps one of the adapters instead of a merge."""
    figures = [kept.figures[key.of("auto")] for key in keys if key.of("auto") in kept.figures]
    if not figures or not all("chosen" in one for one in figures):
        return {}
    alone = [one["chosen"].endswith(" alone") for one in figures]
    return {"share that keeps an adapter alone": statistics.mean(map(float, alone))}


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as text, by how many test rows of each task they are of, the most first."""
    head = (
        "Normalised accuracy, %, mean ± std over seeds (merges). – : refused, of a larger rank than asked for, or not "
        "measured.\n"
    )
    parts = [
        f"\n## {rows} test rows of each task, seeds {found[rows]['settings']['seeds']}\n\n{_table(found[rows])}"
        for rows in sorted(found, key=int, reverse=True)
    ]
    return head + "".join(parts)


def _table(found: Mapping[str, Any]) -> str:
    table: Mapping[str, Mapping[str, tuple[float, float] | None]] = found["table"]
    groups: Mapping[str, int] = found["cases"]
    lines = [f"| | {' | '.join(f'{group} ({count})' for group, count in groups.items())} |"]
    lines.append("|---" * (len(groups) + 1) + "|")
    for row, cells in table.items():
        if not any(cells.values()):
            continue
        shown = ["–" if (cell := cells[g]) is None else f"{cell[0]:.1f} ± {cell[1]:.1f}" for g in groups]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    told = [
        f"{what}: {one['ours']} beats PEFT's best, {one['PEFT']}, by {one['points']:.1f} ± {one['error']:.1f} points "
        f"over {one['cases']} merges."
        for what, one in found["margin"].items()
    ]
    told += [f"auto, {what}: {value:.2f}" for what, value in found["auto"].items()]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in told) + "\n"

"""Several runs beside each other: means over seeds and orders, and differences in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from graftory.continual.general import nats
from graftory.continual.metrics import Summary, summarise
from graftory.continual.report import Report
from graftory.continual.report_text import kilobytes, percent, points
from graftory.errors import ConfigError

ROUTER = " (router)"
"""Behind a strategy's name where a router had to find the task."""
_GENERAL = "general text, nats"
"""What the loss on general text has risen by against the bare base."""
_Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A strategy against a reference, over the tasks and runs that both have. In shares of 1, as scores are."""

    strategy: str
    reference: str
    pairs: int
    """Pairs of the final score on one task, of runs with the same name, seed and order."""
    mean: float
    error: float | None
    """Standard error of the mean over the pairs; None for a single one."""
    better: int
    equal: int
    worse: int


def paired_differences(reports: Sequence[Report], reference: str | None = None) -> tuple[Difference, ...]:
    """Every strategy's final scores against those of a reference, task by task: what runs have in common (the order of
    the tasks, the rows, how hard a task is) falls out of the differences.

    Args:
        reports: Finished runs.
        reference: A strategy, ` (router)` behind it where a router found the task; by default that of the first run.

    Raises:
        ConfigError: If there is none such, or a strategy has no run like one of its.
    """
    scores = _scores(reports)
    chosen = reference or next(iter(scores))
    if chosen not in scores:
        raise ConfigError(f"reference: no run of strategy {chosen!r}; there are {', '.join(scores)}")
    return tuple(_difference(name, chosen, scores[name], scores[chosen]) for name in scores if name != chosen)


def mean_rows(reports: Sequence[Report]) -> list[dict[str, str]]:
    """A table: one row per strategy and way to know the task, mean ± standard deviation over its runs, ready to print.

    Transfer and intransigence are there where runs of `single` and `joint` with the same name, seed and order are.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for report in reports:
        numbers = _numbers(_with_bounds(report, reports))
        if report.general is not None:
            numbers[_GENERAL] = report.general.given[-1] - report.general.base
        if report.storage:
            numbers["stored"] = float(sum(report.storage[-1].values()))
        found.setdefault(report.strategy, []).append(numbers)
        if report.routing is not None:
            own = report.routing
            routed = {"ACC": own.acc, "regret": own.regret, "right task": own.id_accuracy, "abstained": own.abstained}
            if report.general is not None and report.general.routed is not None:
                routed[_GENERAL] = report.general.routed[-1] - report.general.base
            found.setdefault(report.strategy + ROUTER, []).append(routed)
    columns = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
    return [
        {"strategy": name, "runs": str(len(runs)), **{column: _spread(column, runs) for column in columns}}
        for name, runs in found.items()
    ]


def difference_rows(differences: Sequence[Difference]) -> list[dict[str, str]]:
    """A table of differences, ready to print."""
    return [
        {
            "strategy": each.strategy,
            "against": each.reference,
            "pairs": str(each.pairs),
            "mean difference": points(each.mean),
            "± standard error": "–" if each.error is None else percent(each.error),
            "better / equal / worse": f"{each.better} / {each.equal} / {each.worse}",
        }
        for each in differences
    ]


def _scores(reports: Sequence[Report]) -> dict[str, dict[_Key, float]]:
    found: dict[str, dict[_Key, float]] = {}
    for report in reports:
        for name, row in _last_rows(report):
            own = found.setdefault(name, {})
            for task, value in zip(report.tasks, row, strict=True):
                key = (*_alike(report), task)
                if key in own:
                    raise ConfigError(
                        f"two runs of {name} called {report.name!r} have seed {report.seed} and the same order; give "
                        "each run once, or another name"
                    )
                own[key] = value
    return found


def _last_rows(report: Report) -> Iterator[tuple[str, Sequence[float]]]:
    yield report.strategy, report.matrix[-1]
    if report.routing is not None:
        yield report.strategy + ROUTER, [value or 0.0 for value in report.routing.matrix[-1]]


def _alike(report: Report) -> _Key:
    return (report.name, report.base, report.seed, report.scenario, *report.tasks)


def _difference(name: str, reference: str, own: Mapping[_Key, float], other: Mapping[_Key, float]) -> Difference:
    values = [own[key] - other[key] for key in own if key in other]
    if not values:
        raise ConfigError(
            f"{name} and {reference} have no two runs with the same name, base, seed and order; nothing can be paired"
        )
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    signs = [(value > 0) - (value < 0) for value in values]
    return Difference(
        name, reference, len(values), fmean(values), error, signs.count(1), signs.count(0), signs.count(-1)
    )


def _with_bounds(report: Report, reports: Sequence[Report]) -> Summary:
    bounds = {other.strategy: other for other in reports if _alike(other) == _alike(report)}
    learnt = {
        name: [bounds[name].matrix[j][j] for j in range(len(report.tasks))]
        for name in ("single", "joint")
        if name in bounds
    }
    untrained = [result.untrained for result in report.results]
    return summarise(report.matrix, untrained=untrained, single=learnt.get("single"), joint=learnt.get("joint"))


def _numbers(summary: Summary) -> dict[str, float]:
    named = {
        "ACC": summary.acc,
        "AAA": summary.aaa,
        "BWT": summary.bwt,
        "forgetting": summary.forgetting,
        "FWT": summary.fwt,
        "transfer": summary.transfer,
        "intransigence": summary.intransigence,
    }
    return {name: value for name, value in named.items() if value is not None}


def _spread(column: str, runs: Sequence[Mapping[str, float]]) -> str:
    values = [run[column] for run in runs if column in run]
    if not values:
        return "–"
    mean = _SHOWN.get(column, points)(fmean(values))
    if len(values) < 2 or column == "stored":
        return mean
    return f"{mean} ± {_DEVIATIONS.get(column, percent)(stdev(values))}"


_SHOWN: Mapping[str, Callable[[float], str]] = {
    "ACC": percent,
    "AAA": percent,
    "right task": percent,
    "abstained": percent,
    "stored": lambda value: kilobytes(round(value)),
    _GENERAL: nats,
}
"""How columns are printed that are no differences in points."""
_DEVIATIONS: Mapping[str, Callable[[float], str]] = {_GENERAL: lambda value: f"{value:.3f}"}
"""And their standard deviations."""

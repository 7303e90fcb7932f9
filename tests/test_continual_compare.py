"""Runs beside each other: numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graftory.continual import Report, Routing, TaskResult, paired_differences, summarise
from graftory.continual.compare import difference_rows, mean_rows
from graftory.continual.curves import draw_curves, draw_storage
from graftory.continual.report_text import Block, markdown, page
from graftory.errors import ConfigError


def report(strategy: str, *last: float, seed: int = 0, learnt: float = 0.9) -> Report:
    """A run of two tasks, each at `learnt` after its own training, with the given end."""
    matrix = ((learnt, 0.1), last)
    results = tuple(TaskResult(name, "accuracy", 0.2, 10, 10, f"{name}@1") for name in ("a", "b"))
    storage = ({"adapters": 1000, "heads": 500}, {"adapters": 2000, "heads": 500})
    return Report("run", strategy, "base", results, matrix, summarise(matrix), None, seed=seed, storage=storage)


def test_differences_are_taken_task_by_task() -> None:
    reports = [report("seq", 0.5, 0.9), report("ewc", 0.7, 0.9), report("ewc", 0.6, 0.6, seed=1)]
    reports.append(report("seq", 0.2, 0.7, seed=1))
    [difference] = paired_differences(reports)
    # 0.7 - 0.5, 0.9 - 0.9, 0.6 - 0.2, 0.6 - 0.7
    assert (difference.strategy, difference.reference, difference.pairs) == ("ewc", "seq", 4)
    assert difference.mean == pytest.approx(0.125)
    spread = sum((value - 0.125) ** 2 for value in (0.2, 0.0, 0.4, -0.1)) / 3
    assert difference.error == pytest.approx((spread / 4) ** 0.5)
    assert (difference.better, difference.equal, difference.worse) == (2, 1, 1)
    [other] = paired_differences(reports, "ewc")
    assert other.mean == pytest.approx(-0.125)
    assert difference_rows([difference])[0]["mean difference"] == "+12.50"


def test_only_runs_that_are_alike_are_paired() -> None:
    with pytest.raises(ConfigError, match="nothing can be paired"):
        paired_differences([report("seq", 0.5, 0.9), report("ewc", 0.7, 0.9, seed=1)])
    with pytest.raises(ConfigError, match="no run of strategy 'hope'; there are seq"):
        paired_differences([report("seq", 0.5, 0.9)], "hope")
    with pytest.raises(ConfigError, match="two runs of seq called 'run' have seed 0"):
        paired_differences([report("seq", 0.5, 0.9), report("seq", 0.5, 0.8)])


def test_a_router_is_a_way_of_its_own() -> None:
    routing = Routing(((0.8, None), (0.7, 0.9)), 0.8, 0.05, 0.9, 0.02, ((1, 0, 0), (0, 1, 0)))
    reports = [report("seq", 0.5, 0.9), replace(report("isolated", 0.8, 0.9), routing=routing)]
    found = {difference.strategy: difference.mean for difference in paired_differences(reports)}
    assert found == {"isolated": pytest.approx(0.15), "isolated (router)": pytest.approx(0.1)}
    rows = {row["strategy"]: row for row in mean_rows(reports)}
    assert rows["isolated (router)"]["regret"] == "+5.00"
    assert (rows["isolated (router)"]["right task"], rows["isolated (router)"]["abstained"]) == ("90.0", "2.0")
    assert rows["seq"]["regret"] == "–"


def test_means_and_bounds_by_hand() -> None:
    reports = [report("seq", 0.5, 0.9), report("seq", 0.3, 0.7, seed=1), report("single", 0.9, 0.8, learnt=0.95)]
    reports.append(report("joint", 0.9, 0.98, learnt=0.9))
    rows = {row["strategy"]: row for row in mean_rows(reports)}
    assert rows["seq"]["runs"] == "2"
    assert rows["seq"]["ACC"] == "60.0 ± 14.1"  # 70 and 50
    assert rows["seq"]["stored"] == "2.5"
    # seed 0 alone has bounds: ((0.9 - 0.95) + (0.9 - 0.8)) / 2 and ((0.9 - 0.9) + (0.98 - 0.9)) / 2
    assert rows["seq"]["transfer"] == "+2.50"
    assert rows["seq"]["intransigence"] == "+4.00"


def test_one_report_in_two_forms() -> None:
    blocks = [Block("Tasks", "Scores <in> %", [{"task": "a<b", "x": "1"}]), Block("Map", picture="m.png")]
    text = markdown("T", blocks)
    assert "## Tasks\n\nScores <in> %\n\n| task | x |\n|---|---|\n| a<b | 1 |" in text
    assert "![Map](m.png)" in text
    html = page("T", blocks, {"m.png": b"\x89PNG"})
    assert "<td>a&lt;b</td>" in html
    assert "<p>Scores &lt;in&gt; %</p>" in html
    assert 'src="data:image/png;base64,iVBORw==' in html
    assert "<script" not in html


def test_pictures_are_the_same_for_the_same_run() -> None:
    ways = {"given": ((0.9, 0.1), (0.5, 0.8)), "router": ((0.8, None), (0.5, 0.7))}
    assert draw_curves(["a", "b"], ways) == draw_curves(["a", "b"], ways)
    storage = [{"adapters": 1000}, {"adapters": 1000, "rows": 500}]
    image = draw_storage(["a", "b"], storage)
    assert image.startswith(b"\x89PNG")
    assert image == draw_storage(["a", "b"], storage)
    assert image != draw_storage(["a", "b"], storage[::-1])

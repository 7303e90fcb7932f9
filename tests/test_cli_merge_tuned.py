"""`hub merge` with --method auto, --tune and --report, on a tiny random BERT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.cli import cli
from graftory.compose.merge.tuning import PORTFOLIO
from graftory.compose.merge.tuning.adamerging import layer_of
from tests.merge_home import LABELS, Home, make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("tuned"))


def invoke(home: Home, *args: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(home.hub), "merge", *map(str, args)])


def run(home: Home, *args: object) -> Result:
    result = invoke(home, *args)
    assert result.exit_code == 0, result.output
    return result


def names(home: Home) -> set[str]:
    return {row.name for row in Hub.open(home.hub).index()}


def test_auto_shows_what_it_tried_and_is_made_again(home: Home) -> None:
    found = json.loads(run(home, *LABELS, "--method", "auto", "--tune-rows", "6", "--name", "best", "--json").output)
    rows = found["auto"]["tried"]
    assert {"nothing", "single", "task arithmetic"} <= {row["floor"] for row in rows}
    (chosen,) = [row for row in rows if row["name"] == found["auto"]["chosen"]]
    assert chosen["behind"][0] <= 2 * chosen["behind"][1]
    assert chosen["rows"] == 6
    assert {"ties", "tsv", "regmean", "lego", "fisher"} <= {row["method"] for row in rows if row["score"] is not None}
    lineage = Hub.open(home.hub).record("best").spec.lineage
    assert lineage.parameters["method"] == chosen["method"]
    told = lineage.parameters["auto"]
    assert told["rows"] == 6
    assert [row["name"] for row in told["tried"]] == [row["name"] for row in rows]
    again = json.loads(run(home, "best", "--again", "--json").output)
    assert again["same"]
    refused = invoke(home, "best", "--without", "two", "--name", "never")
    assert "its method was found with all parents in it" in refused.stderr


def test_auto_tells_people_why(home: Home) -> None:
    shown = run(home, "two", "three", "--method", "auto", "--tune-rows", "6", "--name", "told").output
    told = Hub.open(home.hub).record("told").spec.lineage.parameters["auto"]
    tried = [row for row in told["tried"] if row["score"] is not None and row["rows"] == 6]
    left = sum(row["behind"][0] <= 2 * row["behind"][1] for row in tried)
    why = "the best" if left == 1 else f"of {left} that 6 rows of each task cannot tell apart"
    assert f"{told['chosen']} is kept, {why}\n" in shown
    assert re.search(r"→ " + re.escape(told["chosen"].split()[0]) + r" .* 6 ", shown)


def test_auto_tells_people_that_an_adapter_alone_gets_more_right(home: Home) -> None:
    few = ["two", "pair", "--method", "auto", "--tune-rows", "6", "--seed", "1"]
    shown = run(home, *few, "--name", "alone").output
    found = json.loads(run(home, *few, "--name", "alone-json", "--json").output)["auto"]
    first, (best, *_) = found["first"], found["alone"]
    assert first in {one.name for one in PORTFOLIO}
    assert found["chosen"] == best["name"] == "two@1 alone"
    assert f"\n{first} came first, of " in shown
    points, error = (100 * value for value in best["ahead"])
    assert points > 0
    assert (
        f"\ntwo@1 alone gets {points:.1f} ± {error:.1f} points more right on 24 rows of each task: it is kept\n"
        in shown
    )
    assert Hub.open(home.hub).record("alone").spec.lineage.parameters["auto"]["alone"] == found["alone"]
    brief = CliRunner().invoke(cli, ["--registry", str(home.hub), "show", "alone"]).output
    assert f"auto=(alone=2, chosen=two@1 alone, first={first}, rows=6, tried={len(found['tried'])})" in brief


def test_weights_are_tuned_and_recorded(home: Home) -> None:
    few = ["--method", "lorahub", "--tune", home.task("two"), "--tries", "6", "--tune-rows", "8"]
    run(home, "two", "pair", *few, "--name", "few")
    lineage = Hub.open(home.hub).record("few").spec.lineage
    assert lineage.parameters["tuned"]["on"] == home.task("two")
    assert lineage.parameters["tuned"]["loss"] < lineage.parameters["tuned"]["base_loss"]
    assert json.loads(run(home, "few", "--again", "--json").output)["same"]
    run(home, *LABELS, "--method", "adamerging", "--steps", "2", "--tune-rows", "6", "--rank", "4", "--name", "sure")
    lineage = Hub.open(home.hub).record("sure").spec.lineage
    layers = {layer_of(path) for path in home.adapters["two"].spec.config.targets}
    assert {row[0] for row in lineage.parameters["weights_at"]} == {f"{layer}.*" for layer in layers}
    assert lineage.parameters["tuned"]["rows"] == 6
    assert json.loads(run(home, "sure", "--again", "--json").output)["same"]
    refused = invoke(home, "sure", "--without", "two", "--name", "never")
    assert "its weights were found with all parents in it" in refused.stderr


def test_a_report_needs_no_name_and_keeps_nothing(home: Home, tmp_path: Path) -> None:
    picture, before = tmp_path / "why.svg", names(home)
    arguments = ["two", "three", "--weights", "1,1", "--report", picture, "--report-rows", "24"]
    found = json.loads(run(home, *arguments, "--json").output)["report"]
    assert names(home) == before
    assert picture.read_bytes().startswith(b"<?xml")
    assert [row["own"] for row in found["retention"]] == [1.0, 1.0]
    least = min(row["merged"] for row in found["retention"])
    assert found["advice"]["what"] == ("merge" if least >= 0.95 else "route")
    assert {row["adapter"] for row in found["interference"]["effects"]} == {"two@1", "three@1"}
    assert found["interference"]["by_inputs"]
    text = run(home, "two", "three", "--report", picture, "--name", "reported").output
    assert "two@1, three@1" in text
    assert "merged into reported@1" in text
    assert "rows would tell more" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "lorahub"], "needs --tune TASK"),
        (["--tune", "x"], "--tune goes with --method lorahub or adamerging, not with linear"),
        (["--tune-rows", "4"], "--tune-rows goes with"),
        (["--method", "auto", "--weights", "1,1,1"], "--weights and --method auto do not go together"),
        (["--method", "auto", "--select", "greedy", "--on", "x"], "--select greedy and --method auto"),
        (["--method", "auto", "--density", "0.5"], "--density belongs to"),
        (["--report-rows", "4"], "--report-rows needs --report FILE"),
        (["--report", "why.txt"], "wanted .png, .svg, .pdf"),
        (["--method", "lorahub", "--tune", "gone.yaml"], "no task file 'gone.yaml'"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], text: str, home: Home) -> None:
    result = invoke(home, *LABELS, "--name", "never", *options)
    assert result.exit_code == 1
    assert text in result.stderr
    assert "never" not in names(home)


@pytest.mark.parametrize("method", ["auto", "linear"])
def test_an_adapter_is_merged_once(method: str, home: Home) -> None:
    before = names(home)
    result = invoke(home, "two", "three", "two@1", "--method", method, "--name", "never")
    assert result.exit_code == 1
    assert "two@1 is the same adapter as two; give each once" in result.stderr
    assert names(home) == before

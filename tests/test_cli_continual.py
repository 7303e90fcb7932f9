"""`hub continual` on a tiny random BERT: two halves of the example task, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.cli import cli
from tests.test_cli_train import EXAMPLES, make_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two tasks, a sequence and a hub."""
    folder = tmp_path_factory.mktemp("continual")
    make_base(folder / "base", seed=0)
    head, *rows = (EXAMPLES / "tickets.csv").read_text().splitlines()
    for name, kept in (("first", ("billing", "technical")), ("second", ("technical", "shipping"))):
        chosen = [row for row in rows if row.endswith(kept)]
        (folder / f"{name}.csv").write_text("\n".join([head, *chosen]))
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\nkind: classification\ndata: {{train: {name}.csv, holdout: 0.3}}\n"
            "text: message\nlabel: queue\nmax_length: 16\n"
        )
    (folder / "sequence.yaml").write_text(
        "name: halves\nbase: base\ntasks: [first.yaml, second.yaml]\noptions: {rank: 2}\ntrain: {max_steps: 4}\n"
    )
    Hub.create(folder / "hub")
    return folder


def call(place: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(place / "hub"), "continual", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Result]:
    """Both strategies, each in its own folder."""
    results = {}
    for strategy in ("isolated", "seq"):
        arguments = ("run", place / "sequence.yaml", "--strategy", strategy, "--dir", place / strategy, "--json")
        results[strategy] = call(place, *arguments)
        assert results[strategy].exit_code == 0, results[strategy].output
    return results


def test_isolated_forgets_nothing(runs: dict[str, Result], place: Path) -> None:
    report = json.loads(runs["isolated"].stdout)
    assert report["summary"]["bwt"] == 0
    assert [result["name"] for result in report["results"]] == ["first", "second"]
    hub = Hub.open(place / "hub")
    assert [hub.record(result["ref"]).spec.method for result in report["results"]] == ["lora", "lora"]
    assert "task 2 of 2, second: train" in runs["isolated"].stderr


def test_a_finished_run_is_only_reported(runs: dict[str, Result], place: Path) -> None:
    again = call(place, "run", place / "sequence.yaml", "--dir", place / "isolated", "--json")
    assert again.stdout == runs["isolated"].stdout
    assert "train" not in again.stderr


def test_report_compares_runs_and_names_the_pictures(runs: dict[str, Result], place: Path) -> None:
    result = call(place, "report", place / "isolated", place / "seq")
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.split()[:2] == ["run", "strategy"]
    assert [line.split()[1] for line in lines if line.startswith("halves ")] == ["isolated", "isolated", "seq"]
    pictures = [Path(line.removeprefix("picture: ")) for line in lines if line.startswith("picture: ")]
    assert len(pictures) == 7  # heat map, curves, storage; and the router's heat map
    assert all(picture.is_file() for picture in pictures)


def test_compare_shows_means_and_paired_differences(runs: dict[str, Result], place: Path) -> None:
    result = call(place, "compare", place / "isolated", place / "seq", "--reference", "seq")
    assert result.exit_code == 0, result.output
    assert "mean difference" in result.stdout
    found = json.loads(call(place, "compare", place / "isolated", place / "seq", "--json").stdout)
    differences = {each["strategy"]: each for each in found["differences"]}
    assert set(differences) == {"isolated (router)", "seq"}
    last = {name: json.loads(run.stdout)["matrix"][-1] for name, run in runs.items()}
    by_hand = sum(b - a for a, b in zip(last["isolated"], last["seq"], strict=True)) / 2
    assert differences["seq"]["mean"] == pytest.approx(by_hand)
    assert differences["seq"]["pairs"] == 2


def test_status_says_what_is_learnt(runs: dict[str, Result], place: Path) -> None:
    result = call(place, "status", place / "seq")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "first", "halves@1"], ["2", "second", "halves@2"]]
    assert "step 2, second: commit" in lines[3]
    missing = call(place, "status", place / "nowhere")
    assert missing.exit_code == 1
    assert "holds no run" in missing.stderr
    assert runs["seq"].exit_code == 0


def test_a_strategy_with_parameters_from_the_command_line(place: Path, tmp_path: Path) -> None:
    arguments = ("--strategy", "ewc+replay", "--param", "ewc.strength=5", "--param", "replay.capacity=3", "--seed", "1")
    run = tmp_path / "run"
    result = call(place, "run", place / "sequence.yaml", *arguments, "--dir", run, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["strategy"] == "ewc+replay"
    sequence = json.loads((run / "sequence.json").read_text())
    assert sequence["parameters"] == {"ewc": {"strength": 5}, "replay": {"capacity": 3}}
    assert sequence["seed"] == 1
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    wrong = call(
        place, "run", place / "sequence.yaml", "--strategy", "ewc", "--param", "power=1", "--dir", tmp_path / "x"
    )
    assert wrong.exit_code == 1
    assert "unknown key 'power'; it takes strength, decay, fisher_rows" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("run", "missing.yaml"), "missing.yaml"),
        (("run", EXAMPLES / "tickets.yaml"), "unknown key"),
        (("report", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_one_line(place: Path, arguments: tuple[str | Path, ...], word: str) -> None:
    result = call(place, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert word in result.stderr


def test_unknown_strategy(place: Path, tmp_path: Path) -> None:
    result = call(place, "run", place / "sequence.yaml", "--strategy", "hope", "--dir", tmp_path / "run")
    assert result.exit_code == 1
    assert "hope" in result.stderr
    assert not list(tmp_path.glob("run/*.json"))


def test_the_router_s_settings_and_the_ridge_head_from_the_command_line(place: Path) -> None:
    from graftory.continual.router_file import load_router

    arguments = ("run", place / "sequence.yaml", "--dir", place / "fixed", "--json")
    result = call(place, *arguments, "--router", "layers=[0, -1]", "--router", "quantile=1")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["routing"]["abstained"] == 0
    router = load_router(place / "fixed" / "router.safetensors")
    assert (router.settings.layers, router.settings.quantile) == ((0, -1), 1.0)
    assert len(router.views) == 1
    for wrong, said in (("layers", "--router: got 'layers', wanted KEY=VALUE"), ("layers=[9]", "router.layers: got 9")):
        failed = call(place, "run", place / "sequence.yaml", "--dir", place / "wrong", "--router", wrong)
        assert failed.exit_code != 0
        assert said in str(failed.exception or failed.output) + failed.output
    arguments = ("run", place / "sequence.yaml", "--dir", place / "ridge", "--json")
    ridge = call(place, *arguments, "--strategy", "ranpac", "--param", "size=16")
    assert ridge.exit_code == 0, ridge.output
    report = json.loads(ridge.stdout)
    assert report["routing"] is None
    assert set(report["storage"][-1]) == {"ridge"}

"""`hub merge --select` on a tiny random BERT and tasks whose words differ."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftory import Hub
from graftory.cli import cli
from graftory.compose import merge
from graftory.compose.select import greedy_soup
from graftory.config import AdapterConfig, DoraConfig, Ia3Config
from graftory.data import load_rows, load_task
from graftory.errors import MergeError
from graftory.training import Job, evaluate, load_base
from tests.adapter_samples import make
from tests.hub_samples import lora
from tests.training_samples import save_base

WORDS = {"low": range(10), "middle": range(10, 20), "high": range(20, 30)}


def invoke(root: Path, *args: object) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(root), *map(str, args)])


def run(root: Path, *args: object) -> Result:
    result = invoke(root, *args)
    assert result.exit_code == 0, result.output
    return result


def sentence(words: range, draw: random.Random) -> str:
    return " ".join(f"w{draw.choice(words)}" for _ in range(6))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with an adapter for each domain, all from one seed, and examples of a new domain."""
    folder = tmp_path_factory.mktemp("select")
    base = save_base("bert", folder / "base")
    Hub.create(folder / "hub")
    draw = random.Random(0)
    for name, words in WORDS.items():
        rows = [f"{sentence(words, draw)},{'even' if number % 2 else 'odd'}" for number in range(40)]
        for split in ("train", "test"):
            (folder / f"{name}-{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        files = ", ".join(f"{split}: {name}-{split}.csv" for split in ("train", "test"))
        (folder / f"{name}.yaml").write_text(f"name: {name}\nkind: classification\ndata: {{{files}}}\nlabel: label\n")
        run(folder / "hub", "train", folder / f"{name}.yaml", "--base", base, "--name", name, "--epochs", "1")
    lines = [sentence(WORDS["high"], draw) for _ in range(24)] + [sentence(WORDS["low"], draw) for _ in range(8)]
    (folder / "new.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("how", ["clustering", "similarity"])
def test_those_that_are_like_the_examples_are_merged(how: str, home: Path) -> None:
    arguments = ["merge", *WORDS, "--method", "soup", "--select", how, "--examples", home / "new.txt", "--name", how]
    arguments += ["--threshold", "0.5"] if how == "similarity" else []
    found = json.loads(run(home / "hub", *arguments, "--json").output)
    scores = {row["name"]: row["score"] for row in found["selection"]["choices"]}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    hub = Hub.open(home / "hub")
    lineage = hub.record(how).spec.lineage
    chosen = [row["name"] for row in found["selection"]["choices"] if row["chosen"]]
    assert [parent.ref for parent in lineage.parents] == chosen
    assert lineage.parameters["select"] == how
    assert lineage.parameters["judged"] == scores
    if how == "clustering":
        assert chosen[0] == "high@1"
        assert "middle@1" not in chosen
        assert sum(scores.values()) == pytest.approx(1)
    else:
        assert chosen == [name for name, score in scores.items() if score > 0.5]


def test_a_table_says_why(home: Path) -> None:
    out = run(home / "hub", "merge", *WORDS, "--select", "clustering", "--examples", home / "new.txt", "--name", "why")
    lines = out.output.splitlines()
    assert lines[0].split() == ["adapter", "merged", "because"]
    assert lines[3].split(maxsplit=2) == ["middle@1", "no", "0% of the examples in its clusters, less than 10%"]
    assert lines[4].startswith("merged into why@1")


def test_greedy_tries_them_on_a_task(home: Path) -> None:
    arguments = ["merge", *WORDS, "--method", "soup", "--select", "greedy", "--on", home / "high.yaml", "--on-rows", 20]
    found = json.loads(run(home / "hub", *arguments, "--name", "greedy", "--json").output)["selection"]
    scores = [row["score"] for row in found["choices"]]
    assert scores == sorted(scores, reverse=True)
    assert found["choices"][0]["chosen"]
    assert Hub.open(home / "hub").record("greedy").spec.lineage.parameters["on_rows"] == 20


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_greedy_tries_the_merge_that_is_made_in_the_end(method: str, home: Path) -> None:
    """Of methods that look at rows too: the score beside the last that was taken is that of the merge."""
    name = f"greedy-{method}"
    arguments = ["merge", *WORDS, "--method", method, "--select", "greedy", "--on", home / "high.yaml", "--on-rows", 20]
    found = json.loads(run(home / "hub", *arguments, "--name", name, "--json").output)
    hub, task = Hub.open(home / "hub"), load_task(str(home / "high.yaml"))
    taken = [row for row in found["selection"]["choices"] if row["chosen"]]
    loaded, rows = load_base(str(home / "base"), "classification"), load_rows(task, "train", limit=20, seed=0)
    (metrics,) = evaluate(loaded, [Job("merged", hub.get(name), None, task, rows)])
    assert len(taken) > 1
    assert f"with it {metrics[0].value:.4f}" in taken[-1]["reason"]


@pytest.mark.parametrize("config", [DoraConfig(rank=2), Ia3Config()], ids=lambda config: config.method)
def test_greedy_has_the_base_for_adapters_whose_update_needs_it(config: AdapterConfig, home: Path) -> None:
    hub, loaded = Hub.open(home / "hub"), load_base(str(home / "base"), "classification")
    task, spec = load_task(str(home / "high.yaml")), hub.record("high").spec
    assert spec.task is not None
    rows = load_rows(task, "train", limit=20, seed=0)
    adapters = {}
    for number in range(2):
        made = make(loaded.model, config, labels=2, seed=number)
        adapters[f"{config.method}{number}"] = replace(made, spec=replace(made.spec, base=spec.base, task=spec.task))
    for name, adapter in adapters.items():
        hub.put(name, adapter)
    arguments = ["merge", *adapters, "--method", "linear", "--select", "greedy", "--on", home / "high.yaml"]
    name = f"greedy-{config.method}"
    found = json.loads(run(home / "hub", *arguments, "--on-rows", 20, "--name", name, "--json").output)
    first, second = found["selection"]["choices"]
    parts = [adapters[row["name"].removesuffix("@1")] for row in (first, second)]
    merged = merge(parts, "linear", base=loaded.model)
    (metrics,) = evaluate(loaded, [Job("merged", merged, None, task, rows)])
    assert f"with it {metrics[0].value:.4f}, without {first['score']:.4f}" in second["reason"]
    with pytest.raises(MergeError, match="base"):
        greedy_soup(adapters, lambda _: 0.0, method="linear")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--select", "clustering"], "--select clustering needs --examples"),
        (["--select", "greedy"], "--select greedy needs --on"),
        (["--examples", "x.txt"], "--examples and no --select do not go together"),
        (["--select", "greedy", "--on", "x", "--examples", "y"], "--examples and --select greedy do not go together"),
        (["--select", "similarity", "--examples", "x.txt", "--weights", "1,1,1"], "--weights and --select"),
        (["--most", "2"], "--most needs --select"),
        (["--select", "similarity", "--examples", "gone.txt"], "gone.txt: cannot be read"),
        (["--select", "similarity", "--examples", "gone.txt", "--threshold", "3"], "wanted 0 to 1"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], text: str, home: Path) -> None:
    result = invoke(home / "hub", "merge", *WORDS, "--name", "never", *options)
    assert result.exit_code == 1
    assert text in result.stderr
    assert "never" not in {row.name for row in Hub.open(home / "hub").index()}


def test_parents_are_suggested_with_reasons(home: Path) -> None:
    found = json.loads(run(home / "hub", "compose", "suggest", home / "high.yaml", *WORDS, "--json").output)
    rows = {row["name"]: row for row in found["adapters"]}
    assert found["adapters"][0]["name"] == "high@1"
    assert rows["high@1"]["suggested"]
    assert rows["high@1"]["share"] > 0.9
    assert "has the same labels, so its head serves too" in rows["high@1"]["reasons"]
    text = run(home / "hub", "compose", "suggest", home / "high.yaml", "--threshold", "1", "--min-share", "0.5").output
    assert "hub compose fusion" in text.splitlines()[-1]
    assert "high@1 --name NAME" in text.splitlines()[-1]


def test_what_cannot_be_a_parent_is_left_out_and_said(home: Path, tmp_path: Path) -> None:
    Hub.create(tmp_path / "empty")
    result = invoke(tmp_path / "empty", "compose", "suggest", home / "high.yaml")
    assert "the hub is empty" in result.stderr
    Hub.open(tmp_path / "empty").put("made", lora())
    result = invoke(tmp_path / "empty", "compose", "suggest", home / "high.yaml")
    assert "made@1: its record does not name the task" in result.stderr


def test_aligned_by_activations_of_examples(home: Path) -> None:
    arguments = ["merge", "low", "high", "--method", "mera", "--by", "activations", "--examples", home / "new.txt"]
    run(home / "hub", *arguments, "--name", "aligned")
    lineage = Hub.open(home / "hub").record("aligned").spec.lineage
    assert lineage.parameters["by"] == "activations"
    assert lineage.parameters["examples"] == str(home / "new.txt")
    refused = invoke(home / "hub", "merge", "low", "high", "--method", "mera", "--by", "activations", "--name", "never")
    assert "give --examples" in refused.stderr


def test_only_adapters_of_the_track_are_merged_and_the_best_anchor_is_found(home: Path) -> None:
    arguments = ["merge", *WORDS, "--method", "mera", "--select", "same-track", "--on", home / "high.yaml"]
    arguments += ["--anchor", "0", "--on-rows", "20", "--name", "family"]
    found = json.loads(run(home / "hub", *arguments, "--json").output)
    assert all(row["chosen"] for row in found["selection"]["choices"])
    parameters = Hub.open(home / "hub").record("family").spec.lineage.parameters
    scores = parameters["anchors"]
    assert len(scores) == 3
    assert parameters["anchor"] == scores.index(max(scores)) + 1
    refused = invoke(home / "hub", "merge", *WORDS, "--method", "mera", "--anchor", "0", "--name", "never")
    assert "--anchor 0 needs --on" in refused.stderr

"""Sequences of text-to-text tasks on a tiny causal language model: what is written, and what the base forgets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from graftory.adapters import attach
from graftory.cli import cli
from graftory.continual import compare_runs, load_report, load_sequence, run_sequence
from graftory.continual.capability import check_kinds
from graftory.continual.compare import mean_rows
from graftory.continual.general import general_rows
from graftory.continual.probe import probe_texts
from graftory.continual.probed import ProbeSettings
from graftory.continual.report_files import write_report
from graftory.continual.state import RunFolder
from graftory.continual.strategies import PLUGINS, STRATEGIES, strategy_of
from graftory.data import load_rows, load_task
from graftory.errors import ConfigError, DataError
from graftory.hub import Hub
from graftory.training import load_base
from tests.text_samples import SEQUENCE, TASKS, Run, make_place, text_run

TWO = tuple(TASKS)[:2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run_of(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    made: dict[str, Run] = {}

    def run(strategy: str) -> Run:
        if strategy not in made:
            made[strategy] = text_run(place, tmp_path_factory.mktemp(strategy), strategy, TWO)
        return made[strategy]

    return run


def test_seq_forgets_what_to_write_and_how_to_count_and_replay_forgets_less(run_of: Callable[..., Run]) -> None:
    seq, replay = run_of("seq")[0], run_of("replay")[0]
    assert [result.untrained for result in seq.results] == [0.0, 0.0]
    assert [result.metric for result in seq.results] == ["exact_match"] * 2
    assert min(seq.matrix[0][0], seq.matrix[1][1]) > 0.5
    assert seq.matrix[1][0] < 0.2 < replay.matrix[1][0]
    assert seq.losses[1][0] > 2 * seq.losses[0][0]
    assert seq.general is not None
    # the base has learnt to count; the adapter is in the way, the more the longer it learns
    assert seq.general.base < 0.2 < 1.0 < seq.general.given[0] < seq.general.given[1]
    assert seq.general.worst == seq.general.given
    assert seq.general.routed is None


def test_the_matrix_and_the_losses_again_by_hand(run_of: Callable[..., Run], place: Path) -> None:
    """R[2][1] of seq, one row at a time: greedy choice after greedy choice, and log-probabilities of the answer."""
    report, versions, _ = run_of("seq")
    loaded = load_base(str(place / "base"), "causal_lm")
    adapted = attach(loaded.model, {"newest": versions[1]})
    rows = load_rows(load_task(str(place / f"{TWO[1]}.yaml")), "test", limit=16, seed=3)
    right, loss, count = 0, 0.0, 0
    for text, target in zip(rows.texts, rows.targets, strict=True):
        ids = loaded.tokenizer(f"w38 {text}")["input_ids"]
        answer = [*loaded.tokenizer(str(target))["input_ids"], loaded.tokenizer.eos_token_id]
        with torch.no_grad(), adapted.route("newest"):
            logits = adapted(input_ids=torch.tensor([ids + answer])).logits[0]
            written: list[int] = []
            while len(written) < 5 and loaded.tokenizer.eos_token_id not in written:
                written.append(int(adapted(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        right += written == answer
        log = functional.log_softmax(logits[len(ids) - 1 : -1].double(), dim=-1)
        loss -= float(log[range(len(answer)), answer].sum())
        count += len(answer)
    assert report.matrix[1][1] == pytest.approx(right / 16)
    assert report.losses[1][1] == pytest.approx(loss / count, rel=1e-4)


def test_the_probe_again_by_hand(run_of: Callable[..., Run], place: Path) -> None:
    """The base and the isolated adapters on general text, with the loss of transformers itself."""
    report, versions, folder = run_of("isolated")
    loaded = load_base(str(place / "base"), "causal_lm")
    settings = ProbeSettings(text=str(place / "general.txt"), rows=12, max_length=16)
    batches = [loaded.tokenizer(text, return_tensors="pt") for text in probe_texts(settings, 3)]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (12, 12)
    with torch.no_grad():
        base = float(loaded.model(input_ids=ids, labels=ids).loss)
        found = []
        for version in versions:
            adapted = attach(loaded.model, {"own": version})
            with adapted.route("own"):
                found.append(float(adapted(input_ids=ids, labels=ids).loss))
            adapted.detach()
    general = report.general
    assert general is not None
    assert (general.texts, general.tokens) == (12, 12 * 11)
    assert general.base == pytest.approx(base, rel=1e-4)
    assert general.given == pytest.approx((found[0], sum(found) / 2), rel=1e-4)
    assert general.worst == pytest.approx((found[0], max(found)), rel=1e-4)
    assert general.routed is not None
    point = folder.probed(2)
    assert point is not None
    assert sum(point.routes.values()) == 12
    assert min(base, *found) - 1e-4 <= general.routed[1] <= max(found) + 1e-4


def test_an_adapter_that_stayed_is_not_probed_again(run_of: Callable[..., Run]) -> None:
    first, second = (run_of("isolated")[2].probed(step) for step in (1, 2))
    assert first is not None
    assert second is not None
    assert second.digests[TWO[0]] == first.digests[TWO[0]]
    assert second.tasks[TWO[0]] == first.tasks[TWO[0]]
    assert second.digests[TWO[1]] != first.digests[TWO[0]]


def test_isolated_forgets_nothing_and_apart_not_a_bit(run_of: Callable[..., Run], place: Path, tmp_path: Path) -> None:
    mixed = run_of("isolated")[0]
    assert mixed.summary.bwt == 0.0  # no row stands on the edge here
    assert mixed.losses[1][0] == pytest.approx(mixed.losses[0][0], rel=1e-5)
    assert mixed.routing is not None
    apart, versions, _ = text_run(place, tmp_path, "isolated", TWO, eval_mixed=False)
    assert apart.summary.bwt == apart.summary.forgetting == 0.0
    assert apart.losses[1][0] == apart.losses[0][0]
    assert apart.matrix == mixed.matrix
    assert all(not version.head_tensors() for version in versions)


class KilledError(Exception):
    pass


def test_a_run_stopped_among_the_cells_goes_on_to_the_same_end(
    run_of: Callable[..., Run], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks of a step share batches: what is there already must not change what is measured later."""
    put_cell = RunFolder.put_cell

    def die_at_cell(self: RunFolder, cell: Any) -> Any:
        if (cell.step, cell.task) == (2, 1) and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise KilledError
        return put_cell(self, cell)

    monkeypatch.setattr(RunFolder, "put_cell", die_at_cell)
    with pytest.raises(KilledError):
        text_run(place, tmp_path, "isolated", TWO)
    assert text_run(place, tmp_path, "isolated", TWO)[0] == run_of("isolated")[0]


@pytest.mark.parametrize("strategy", ["ewc+lwf+a-gem+migu", "inflora", "sd-lora", "slao", "joint"])
def test_every_strategy_without_heads_learns_to_write(place: Path, tmp_path: Path, strategy: str) -> None:
    train = {"max_steps": 8, "learning_rate": 0.02, "batch_size": 8}
    report, versions, _ = text_run(place, tmp_path, strategy, TWO, train=train)
    general = report.general
    assert general is not None
    assert len(general.given) == 2
    assert general.given != (general.base, general.base)
    bare = load_base(str(place / "base"), "causal_lm")
    for j, task in enumerate(TWO):
        rows = load_rows(load_task(str(place / f"{task}.yaml")), "test", limit=16, seed=3)
        untrained = _loss_of(bare, rows.texts, rows.targets)
        assert report.losses[j][j] < untrained - 1.0
    assert all(not version.head_tensors() for version in versions)


def _loss_of(loaded: Any, texts: Any, targets: Any) -> float:
    total, count = 0.0, 0
    for text, target in zip(texts, targets, strict=True):
        prompt = loaded.tokenizer(f"w38 {text}")["input_ids"]
        ids = torch.tensor([[*prompt, *loaded.tokenizer(target)["input_ids"], loaded.tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=labels).loss) * 2
        count += 2
    return total / count


def test_a_task_measured_by_its_loss_counts_by_its_likelihood(place: Path, tmp_path: Path) -> None:
    for task in TWO:
        text = (place / f"{task}.yaml").read_text().replace("metric: exact_match\n", "")
        (place / f"{task}-loss.yaml").write_text(text.replace(f"name: {task}", f"name: {task}-loss"))
    tasks = [f"{task}-loss" for task in TWO]
    short = {"max_steps": 4, "learning_rate": 0.01, "batch_size": 8}
    report, _, _ = text_run(place, tmp_path, "seq", tasks, train=short, scenario="domain", probe=None)
    assert {result.metric for result in report.results} == {"likelihood"}
    for scores, losses in zip(report.matrix, report.losses, strict=True):
        assert scores == pytest.approx([math.exp(-loss) for loss in losses])
    assert report.general is None


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_what_needs_heads_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="'frozen' trains nothing but heads, and the causal_lm task 'height'"
    ) as caught:
        text_run(place, tmp_path, "frozen")
    assert "those that can: seq, isolated, o-lora" in str(caught.value)
    with pytest.raises(ConfigError, match="'replay' keeps the logits of heads"):
        text_run(place, tmp_path, "replay", parameters={"alpha": 0.5})
    with pytest.raises(ConfigError, match="scenario 'class': 'height': it is a causal_lm task"):
        text_run(place, tmp_path, "isolated", scenario="class")
    assert not (tmp_path / "run" / "sequence.json").exists()
    sequence = load_sequence(place / "sequence.yaml")
    for name in (*STRATEGIES, *PLUGINS):
        if name not in ("frozen", "ranpac"):
            check_kinds(sequence, strategy_of(name).needs, [load_task(str(place / "height.yaml"))])


def test_a_probe_wants_a_language_model_and_text(place: Path, tmp_path: Path) -> None:
    sequence = replace(load_sequence(place / "sequence.yaml"), tasks=("wheel:trec",))
    with pytest.raises(ConfigError, match=r"probe: wanted causal_lm tasks, .* 'trec' is a classification task"):
        check_kinds(sequence, strategy_of("seq").needs, [load_task("wheel:trec")])
    with pytest.raises(ConfigError, match="probe: got rows 0 and max_length 16"):
        ProbeSettings(text="a.txt", rows=0, max_length=16)
    (tmp_path / "empty.txt").write_text("\n\n \n")
    with pytest.raises(DataError, match="holds no text"):
        probe_texts(ProbeSettings(text=str(tmp_path / "empty.txt")), 0)
    with pytest.raises(DataError, match=r"cannot read .*none\.txt"):
        probe_texts(ProbeSettings(text=str(tmp_path / "none.txt")), 0)


def test_the_texts_of_a_probe_are_drawn_once_each(tmp_path: Path, place: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\none two\r\n\r\nfour\n")
    texts = probe_texts(ProbeSettings(text=str(tmp_path / "a.txt")), 0)
    assert texts == ("one two", "three", "four")
    some = probe_texts(ProbeSettings(text=str(tmp_path / "a.txt"), rows=2), 5)
    assert len(some) == 2
    assert set(some) < set(texts)
    inputs = load_rows(load_task(str(place / "height.yaml")), "test").texts
    assert set(probe_texts(ProbeSettings(text=str(place / "height.yaml"), rows=100), 0)) == set(inputs)


# --- what people see -------------------------------------------------------------------------------------------------


def test_the_report_shows_losses_and_general_text(run_of: Callable[..., Run], tmp_path: Path) -> None:
    report = run_of("isolated")[0]
    assert report.general is not None
    write_report(report, tmp_path)
    assert load_report(tmp_path) == report
    text = (tmp_path / "report.md").read_text()
    assert "## Loss" in text
    assert "## General text" in text
    assert f"{math.exp(report.general.base):.2f}" in text
    for name in ("general.png", "curves.png", "heatmap-oracle.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "general.png" in text
    rows = general_rows(report.general, report.tasks)
    assert [row["after"] for row in rows] == ["(bare base)", *TWO]
    assert rows[0]["change"] == "0"
    assert rows[1]["change"] == f"{report.general.given[0] - report.general.base:+.3f}"
    (given, router) = compare_runs([report])
    perplexity = "perplexity of general text"
    assert given[perplexity].startswith(f"{math.exp(report.general.given[1]):.2f} (+")
    assert router[perplexity] != given[perplexity]


def test_the_command_runs_a_sequence_of_texts(place: Path, tmp_path: Path) -> None:
    path = place / "short.yaml"
    path.write_text(SEQUENCE.format(name="short", tasks="height.yaml").replace("max_steps: 30", "max_steps: 2"))
    Hub.create(tmp_path / "hub")
    arguments = ["--registry", str(tmp_path / "hub"), "continual", "run", str(path), "--strategy", "seq", "--json"]
    done = CliRunner().invoke(cli, [*arguments, "--dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["results"][0]["metric"] == "exact_match"
    assert found["general"]["base"] < 0.5
    assert (tmp_path / "run" / "general.png").exists()
    shown = CliRunner().invoke(cli, ["continual", "report", str(tmp_path / "run")])
    assert "perplexity of general text" in shown.output


def test_compared_runs_show_the_mean_change_on_general_text(run_of: Callable[..., Run]) -> None:
    report = run_of("isolated")[0]
    general = report.general
    assert general is not None
    assert general.routed is not None
    other = replace(report, seed=4, general=replace(general, given=(0.0, general.base + 1.0)))
    given, router = mean_rows([report, other])
    changes = (general.given[1] - general.base, 1.0)
    expected = f"{sum(changes) / 2:+.3f} ± {abs(changes[0] - changes[1]) / math.sqrt(2):.3f}"
    assert given["general text, nats"] == expected
    assert router["general text, nats"] == f"{general.routed[1] - general.base:+.3f} ± 0.000"


# --- a real model ----------------------------------------------------------------------------------------------------

REAL = """\
name: words
base: wheel:smollm2
tasks: [questions.yaml]
strategy: seq
options: {rank: 4}
train: {max_steps: 2, batch_size: 2, learning_rate: 0.003, warmup: 0.0}
limits: {train: 8, test: 3}
probe: {text: general.txt, rows: 3, max_length: 32}
"""
QUESTIONS = """\
name: questions
kind: causal_lm
data: {sample: wheel:trec}
target: label
metric: exact_match
max_length: 40
template: "Question: {text}\\nType:"
"""
GENERAL = """\
The sun rises in the east and sets in the west, and people have told the time by it for thousands of years.

Water boils at one hundred degrees Celsius at sea level, and at a lower temperature high in the mountains.

She opened the window, looked out at the garden, and decided that it was too cold to have breakfast outside.
"""


@pytest.mark.real
def test_smollm2_loses_general_ability_to_a_coarse_adapter(tmp_path: Path) -> None:
    for name, text in (("s.yaml", REAL), ("questions.yaml", QUESTIONS), ("general.txt", GENERAL)):
        (tmp_path / name).write_text(text)
    report = run_sequence(load_sequence(tmp_path / "s.yaml"), Hub.create(tmp_path / "hub"), tmp_path / "run")
    assert report.general is not None
    # a language model of this size reads plain English at a perplexity of some tens
    assert 1.5 < report.general.base < 4.5
    assert abs(report.general.given[0] - report.general.base) > 1e-3
    untrained = RunFolder(tmp_path / "run").cell(0, 0, "oracle")
    assert untrained is not None
    assert untrained.loss is not None
    assert report.losses[0][0] < untrained.loss - 0.5

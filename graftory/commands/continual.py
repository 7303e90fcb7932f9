"""`hub continual`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftory.commands.output import json_option, print_json, print_table, working
from graftory.commands.predict import answer, cell, inputs_of, with_texts
from graftory.schema import Json

if TYPE_CHECKING:
    from graftory.continual import Asked, Event, Report, RouterSettings, StudyReport
    from graftory.continual.state import Commit


@click.group("continual")
def command() -> None:
    """Learn tasks one after another, and report what was forgotten.

    \b
    Example:
      hub continual run sequence.yaml
      hub continual compare my-sequence-isolated my-sequence-seq
    """


@command.command("run")
@click.argument("file", metavar="FILE.yaml", type=click.Path(path_type=Path))
@click.option("--strategy", help="How to learn: isolated, seq, ewc, ewc+replay, o-lora, ... [default: the file's]")
@click.option(
    "--param",
    "parameters",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of the strategy; of one of several plugins: PLUGIN.KEY=VALUE. Any number of times.",
)
@click.option(
    "--router",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting of the router: layers=[0,3,6], quantile=1, answer=mixture, ... Any number of times.",
)
@click.option("--seed", type=int, help="Seed of everything. [default: the file's]")
@click.option(
    "--max-drop",
    type=float,
    help="Reject a step after which an old task's score is lower by more than this share (0.02: 2 points). "
    "[default: the file's]",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run: state, report, pictures. [default: NAME-STRATEGY]",
)
@json_option
@click.pass_obj
def run(
    registry: str | None,
    file: Path,
    strategy: str | None,
    parameters: tuple[str, ...],
    router: tuple[str, ...],
    seed: int | None,
    max_drop: float | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Learn the tasks of a sequence, one after another.

    Every step becomes a version in the hub. A run that was stopped goes on with the task it was at; a
    finished one is only reported. The report says how well each task is answered after each step, with
    the task given and, where the strategy allows, with the router choosing the adapter. With --max-drop, a
    step at which old tasks lose too much is kept as a version, but the run goes on from the step before.

    A file with `orders` or `seeds` is as many runs as there are combinations, each in a folder of its own;
    the report has means and standard deviations. Started by torchrun or accelerate launch, all processes
    train together, and the first one writes.

    \b
    Example:
      hub continual run sequence.yaml
      hub continual run sequence.yaml --strategy seq --dir runs/seq
      hub continual run sequence.yaml --strategy ewc --param strength=500
      hub continual run sequence.yaml --strategy ranpac --param size=2000
      hub continual run sequence.yaml --router layers=[0,3,6] --router answer=mixture
      hub continual run sequence.yaml --strategy seq --max-drop 0.05
    """
    from graftory.continual import load_study, run_sequence, run_study
    from graftory.hub import Hub
    from graftory.training import processes

    study = load_study(file)
    sequence = study.sequence
    if strategy is not None and strategy != sequence.strategy:
        # the file's parameters are those of its own strategy
        sequence = replace(sequence, strategy=strategy, parameters={})
    if parameters:
        sequence = replace(sequence, parameters=with_parameters(sequence.parameters, parameters))
    if router:
        sequence = replace(sequence, router=with_router(sequence.router, router))
    if seed is not None:
        sequence = replace(sequence, seed=seed)
        study = replace(study, seeds=())
    if max_drop is not None:
        sequence = replace(sequence, max_drop=max_drop)
    hub = Hub.open(registry)
    folder = folder or Path(f"{sequence.name}-{sequence.strategy}")
    total = len(sequence.tasks)
    study = replace(study, sequence=sequence)
    if not study.is_one:
        several = run_study(study, hub, folder, progress=lambda run, event: announce(event, total, f"{run.folder}, "))
        if processes.is_first():
            show_study(several, folder, as_json)
        return
    report = run_sequence(sequence, hub, folder, progress=lambda event: announce(event, total))
    if processes.is_first():
        show([report], [folder], as_json)


@command.command("report")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def report(folders: tuple[Path, ...], as_json: bool) -> None:
    """Compare finished runs, or the runs of studies, in one table.

    \b
    Example:
      hub continual report my-sequence-isolated my-sequence-seq
      hub continual report my-sequence-isolated --json
    """
    from graftory.continual.study import load_reports, run_folders

    show(load_reports(folders), [run for folder in folders for run in run_folders(folder)], as_json)


@command.command("compare")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reference", help="Strategy to hold the others against. [default: that of the first run]")
@json_option
def compare(folders: tuple[Path, ...], reference: str | None, as_json: bool) -> None:
    """Hold finished runs against each other: means over seeds and orders, and paired differences.

    Pairs are the final scores on one task of two runs with the same name, seed and order. With runs of single and
    joint among them, transfer and intransigence are there too.

    \b
    Example:
      hub continual compare runs/* --reference seq
    """
    from graftory.continual.compare import difference_rows, mean_rows, paired_differences
    from graftory.continual.study import load_reports

    reports = load_reports(folders)
    differences = paired_differences(reports, reference)
    means = mean_rows(reports)
    if as_json:
        print_json({"runs": means, "differences": list(differences)})
        return
    for rows in (means, difference_rows(differences)):
        if rows:
            print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
            click.echo()


@command.command("predict")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@with_texts
@click.option("--task", help="The task that the texts are of. [default: found by the run]")
@json_option
@click.pass_obj
def predict(
    registry: str | None,
    folder: Path,
    texts: tuple[str, ...],
    file: Path | None,
    pairs: tuple[str, ...],
    task: str | None,
    as_json: bool,
) -> None:
    """Answer texts by all that a run has learnt; which task a text is of need not be said.

    The run's router finds the task, with its certainty, and that task's adapter answers; a text that looks like no
    task of the run gets no answer. Strategies without a router (seq, o-lora, ...) need --task, unless all tasks have
    the same labels (scenario: domain).

    \b
    Example:
      hub continual predict support-isolated "Where is my parcel?" "How far is the moon?"
      hub continual predict support-isolated --file questions.txt --json
      hub continual predict support-seq --task trec "How far is the moon?"
    """
    from graftory.continual import LearntRun
    from graftory.hub import Hub

    inputs = inputs_of(texts, pairs, file)
    hub = Hub.open(registry)
    with working(f"loading {folder}"):
        run = LearntRun.open(folder, hub)
    with working(f"answering {len(inputs)} texts"):
        found = [asked_row(asked) for asked in run.ask(inputs, task=task)]
    if as_json:
        print_json([{"text": text, **row} for text, row in zip(inputs, found, strict=True)])
        return
    columns = [key for key in dict.fromkeys(key for row in found for key in row) if key != "probabilities"]
    rows = [
        (*("–" if row.get(key) is None else cell(row[key]) for key in columns), cell(text))
        for text, row in zip(inputs, found, strict=True)
    ]
    print_table((*columns, "text"), rows)


@command.command("status")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def status(folder: Path, as_json: bool) -> None:
    """Say how far a run, or each run of a study, is. To go on with it, start it again.

    \b
    Example:
      hub continual status runs/seq
    """
    from graftory.continual.state import RunFolder
    from graftory.continual.study import run_folders
    from graftory.errors import DataError

    runs = run_folders(folder)
    if runs != (folder,):
        found = [(run.name, len(RunFolder(run).commits())) for run in runs]
        if as_json:
            print_json({"runs": [{"run": name, "learnt": count} for name, count in found]})
        else:
            print_table(("run", "tasks learnt"), [(name, str(count)) for name, count in found])
        return
    state = RunFolder(folder)
    commits, events = state.commits(), state.events()
    if not events:
        raise DataError(f"{folder} holds no run; give the folder of one")
    if as_json:
        print_json({"learnt": commits, "last": events[-1]})
        return
    columns = ("step", "task", "adapter", "gate", "stored, kB")
    rows = [(str(c.step), c.task, c.ref, _gate(c), f"{sum(c.stored.values()) / 1000:.1f}") for c in commits]
    print_table(columns, rows)
    last = events[-1]
    click.echo(f"last event: step {last.step}, {last.task}: {last.phase}, {last.time}")


def with_router(settings: RouterSettings, changes: Sequence[str]) -> RouterSettings:
    """Settings of the router with those of the command line.

    Raises:
        ConfigError: If one has another form, or is none of the router's.
    """
    from graftory.continual import RouterSettings
    from graftory.schema import decode, encode

    return decode(RouterSettings, with_parameters(encode(settings), changes, "--router"), "--router")


def with_parameters(parameters: Mapping[str, Any], changes: Sequence[str], option: str = "--param") -> dict[str, Any]:
    """Parameters of a strategy with those of the command line, each `KEY=VALUE` or `PLUGIN.KEY=VALUE`, as YAML reads
    the value.

    Raises:
        ConfigError: If one has another form.
    """
    import yaml

    from graftory.errors import ConfigError

    changed: dict[str, Any] = dict(parameters)
    for text in changes:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option}: got {text!r}, wanted KEY=VALUE")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{option} {key}: cannot read the value {value!r}") from None
        owner, dot, inner = key.partition(".")
        inside = changed.get(owner)
        changed[owner] = {**(inside if isinstance(inside, dict) else {}), inner: read} if dot else read
    return changed


def _gate(commit: Commit) -> str:
    return "accepted" if commit.accepted else f"rejected: {commit.fell} {-100 * commit.drop:+.1f} points"


def asked_row(asked: Asked) -> dict[str, Json]:
    """What a run says of a text, by name."""
    said = {"task": asked.task, "certainty": asked.certainty}
    return said if asked.prediction is None else {**said, **answer(asked.prediction)}


def announce(event: Event, total: int, before: str = "") -> None:
    """Say on the standard error which phase begins."""
    click.echo(f"{before}task {event.step} of {total}, {event.task}: {event.phase}", err=True)


def show_study(study: StudyReport, folder: Path, as_json: bool) -> None:
    """Print means and standard deviations over runs and where the reports are, or all of it as JSON."""
    from graftory.continual.compare import mean_rows

    if as_json:
        print_json(study)
        return
    rows = mean_rows(study.reports)
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    click.echo(f"report: {folder / 'study.md'}")
    for run in study.runs:
        click.echo(f"run: {folder / run.folder / 'report.md'}")


def show(reports: Sequence[Report], folders: Sequence[Path], as_json: bool) -> None:
    """Print runs as a table and where their reports are, or all of it as JSON."""
    from graftory.continual import compare_runs

    if as_json:
        print_json(reports[0] if len(reports) == 1 else list(reports))
        return
    rows = compare_runs(reports)
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    for folder in folders:
        click.echo(f"report: {folder / 'report.md'}")
        for picture in sorted(folder.glob("*.png")):
            click.echo(f"picture: {picture}")

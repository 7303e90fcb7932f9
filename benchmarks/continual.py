"""Every continual strategy on the same tasks, in several orders: what is forgotten, and what it costs.

    python benchmarks/continual.py                      # everything; resumable, --folder keeps what is done
    python benchmarks/continual.py --setting valence    # one setting
    python benchmarks/continual.py --list               # say what would run
    python benchmarks/continual.py --rows 40 --tests 20 --steps 6 --orders 1 --strategies seq,isolated --no-write

Base: All-MiniLM-L6-v2, fp32; LoRA of rank 8 on all linears if not said otherwise, one budget for all strategies,
hyper-parameters that do not change with the order; `joint` has the others' steps for each task, at a quarter of their
learning rate. Settings:

- `tasks` (task-incremental): TREC, Rotten Tomatoes, SMS spam, disaster tweets, banking77, 20 newsgroups and SNLI.
- `valence` (domain-incremental): valence of tweets, of Amazon, film and New York Times texts, which all have the same
  labels; where a row is from is not told.
- `small` (task-incremental): the tasks of `tasks`, LoRA on query and value alone, a third of a percent of the base.
- `classes` (class-incremental): banking77 in seven tasks of eleven intents; only what needs no id at test can do it.

Three orders of the tasks, the first as above, the others drawn; the strategies of `SEEDED` in three seeds too. Each run
is a process of its own, so that its CPU time and largest memory are its own. A run that was stopped goes on.

The results go to benchmarks/results/continual.{json,md}: mean ± standard deviation over orders and seeds, paired
differences to `seq`, and CPU time, peak memory and stored bytes beside those of `seq`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from continual_report import CostedRun, write_report
from intents import split_intents

from graftory.continual import Limits, Report, TaskSequence, load_report, load_sequence, run_sequence
from graftory.continual.strategies import Scenario, strategy_of
from graftory.hub import Hub
from graftory.schema import encode

BASE = "wheel:minilm"
STRATEGIES = (
    *("seq", "isolated", "ranpac", "replay", "ewc", "lwf", "a-gem", "migu"),
    *("o-lora", "inflora", "sd-lora", "slao", "opcm", "gated"),
    *("frozen", "single", "joint"),
)
SEEDED = ("isolated", "seq", "replay", "o-lora", "inflora")
INTENTS = 11


@dataclass(frozen=True, slots=True)
class Setting:
    """Tasks, what is known of a row at test, and where adapters sit."""

    scenario: Scenario
    tasks: tuple[str, ...]
    targets: tuple[str, ...] = ("all",)
    only: tuple[str, ...] = ()
    """Strategies that are run here; none: all."""


SEVEN = tuple(
    f"wheel:{name}" for name in ("trec", "rotten-tomatoes", "sms", "disaster", "banking77", "20newsgroups", "snli")
)
SETTINGS: Mapping[str, Setting] = {
    "tasks": Setting("task", SEVEN),
    "small": Setting("task", SEVEN, ("qv",), ("seq", "isolated", "frozen", "single")),
    "valence": Setting("domain", tuple(f"wheel:valence-{name}" for name in ("tweets", "amazon", "movie", "nyt"))),
    "classes": Setting("class", tuple(f"intents-{number}.yaml" for number in range(7))),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What every task of every strategy gets."""

    rows: int
    tests: int
    steps: int


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    setting: str
    strategy: str
    order: int
    seed: int
    budget: Budget

    def folder(self, root: Path) -> Path:
        """Its own, for this budget."""
        size = "-".join(str(value) for value in asdict(self.budget).values())
        return root / f"{self.setting}-{size}" / f"{self.strategy}-order{self.order}-seed{self.seed}"


def main() -> None:
    """Run what is not there yet, and report."""
    options = arguments()
    if options.one:
        run_one(
            options.folder, Job(**{**json.loads(options.one), "budget": Budget(**json.loads(options.one)["budget"])})
        )
        return
    jobs = list(jobs_of(options))
    if options.list:
        for job in jobs:
            print(job.setting, job.strategy, f"order {job.order}", f"seed {job.seed}")
        return
    for number, job in enumerate(jobs if not options.only_report else [], 1):
        if not is_done(options.folder, job):
            print(
                f"{number}/{len(jobs)} {job.setting} {job.strategy} order {job.order} seed {job.seed}", file=sys.stderr
            )
            command = [sys.executable, __file__, "--folder", str(options.folder), "--one", json.dumps(asdict(job))]
            subprocess.run(command, check=True)
    runs = [finished(options.folder, job) for job in jobs if is_done(options.folder, job)]
    write_report(runs, None if options.no_write else Path(__file__).parent / "results")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-continual"), help="keeps runs and adapters")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="any number of times; by default all")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="of the strategies that are run in several")
    parser.add_argument("--rows", type=int, default=500, help="training rows a task")
    parser.add_argument("--tests", type=int, default=200, help="test rows a task")
    parser.add_argument("--steps", type=int, default=120, help="steps of 8 rows a task")
    parser.add_argument("--only-report", action="store_true", help="run nothing: report what is there")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """All runs; strategies that cannot do a scenario have none there."""
    budget = Budget(options.rows, options.tests, options.steps)
    for setting in options.setting or SETTINGS:
        for strategy in options.strategies.split(","):
            wanted = not SETTINGS[setting].only or strategy in SETTINGS[setting].only
            if not wanted or SETTINGS[setting].scenario not in strategy_of(strategy).needs.scenarios:
                continue
            for order in range(options.orders):
                for seed in range(options.seeds if strategy in SEEDED else 1):
                    yield Job(setting, strategy, order, seed, budget)


def run_one(root: Path, job: Job) -> None:
    """Run it, or go on with it, and write down what it cost."""
    folder = job.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sequence.yaml").write_text(yaml.safe_dump(encode(sequence_of(root, job))))
    began = time.process_time()
    run_sequence(load_sequence(folder / "sequence.yaml"), Hub.create(folder / "hub"), folder / "run")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # of this start alone: a run that was stopped has no honest cost, and its time is left out of the table
    whole = sum(1 for line in (folder / "run" / "events.jsonl").read_text().splitlines() if '"prepare"' in line)
    tasks = len(SETTINGS[job.setting].tasks)
    cost = {"cpu_seconds": time.process_time() - began, "peak_mb": usage.ru_maxrss / 1024, "whole": whole == tasks}
    (folder / "cost.json").write_text(json.dumps(cost))


def sequence_of(root: Path, job: Job) -> TaskSequence:
    """The sequence of a run; its name is that of the setting, so that runs can be paired."""
    setting = SETTINGS[job.setting]
    tasks = list(setting.tasks)
    if job.order:
        random.Random(job.order).shuffle(tasks)
    if job.setting == "classes":
        files = {Path(file).name: file for file in split_intents(root / "intents", INTENTS)}
        tasks = [files[task] for task in tasks]
    train: dict[str, Any] = {"batch_size": 8, "learning_rate": 2e-3, "max_steps": job.budget.steps}
    if job.strategy == "joint":
        # its rows grow with the tasks: as many steps a task as the others; at their rate that many end at chance
        train = {"batch_size": 8, "learning_rate": 5e-4, "epochs": 8 * job.budget.steps / job.budget.rows}
    return TaskSequence(
        name=job.setting,
        base=BASE,
        tasks=tuple(tasks),
        strategy=job.strategy,
        scenario=setting.scenario,
        options={"rank": 8, "targets": list(setting.targets)},
        train=train,
        limits=Limits(train=job.budget.rows, test=job.budget.tests),
        seed=job.seed,
    )


def is_done(root: Path, job: Job) -> bool:
    """Whether it has run to its end."""
    return (job.folder(root) / "cost.json").exists()


def finished(root: Path, job: Job) -> CostedRun:
    """A run that is done."""
    folder = job.folder(root)
    report: Report = load_report(folder / "run")
    return CostedRun(job.setting, job.order, report, **json.loads((folder / "cost.json").read_text()))


if __name__ == "__main__":
    main()

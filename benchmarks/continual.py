"""Every continual strategy on the same tasks, in several orders: what is forgotten, and what it costs.

    python benchmarks/continual.py                      # everything; resumable, --folder keeps what is done
    python benchmarks/continual.py --setting valence    # one setting
    python benchmarks/continual.py --list               # say what would run
    python benchmarks/continual.py --rows 40 --tests 20 --steps 6 --orders 1 --rate 2e-3 --strategies seq --no-write

Base: All-MiniLM-L6-v2, fp32; LoRA of rank 8 on all linears if not said otherwise, one budget for all strategies.
`joint` has the others' steps for each task that it learns at once. Heads learn at 1e-2; the learning rate of all else
is chosen for each strategy, once for all settings, orders and seeds: by ACC on TREC, disaster tweets and banking77 in
turn, on rows that were held out of their training sets; of `RATES`, and while the best is at an end of what was tried,
of half or twice as much. Plugins of `seq` have its rate. `a-gem` looks at as many old rows in a step as new ones; all
other parameters of the strategies are their defaults. Settings:

- `tasks` (task-incremental): TREC, Rotten Tomatoes, SMS spam, disaster tweets, banking77, 20 newsgroups (the first 64
  tokens) and SNLI.
- `valence` (domain-incremental): valence of tweets, of Amazon, film and New York Times texts, which all have the same
  labels; where a row is from is not told.
- `small` (task-incremental): the tasks of `tasks`, LoRA on query and value alone, a third of a percent of the base.
- `probed` (task-incremental): the tasks of `tasks`; each head starts at the best linear one and learns at the rate of
  all else, which is chosen anew.
- `classes` (class-incremental): banking77 in seven tasks of eleven intents; only what needs no id at test can do it.

Three orders of the tasks, the first as above, the others drawn; in `tasks` the flagship and the strongest others, those
of `SEEDED`, in three seeds of the first order too. Each run is a process of its own, so that its CPU time and largest
memory are its own. A run that was stopped goes on.

The results go to benchmarks/results/continual.{json,md,png}: the rates, mean ± standard deviation over orders and
seeds, paired differences to `seq`, and CPU time, peak memory and stored bytes beside those of `seq`. Settings and
strategies that are not run keep what they had, and with it what `seq` took when they were run.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from continual_report import CostedRun, write_report
from intents import split_intents
from own_tasks import held_out, shortened

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
SEEDED = ("isolated", "seq", "replay", "opcm")
PARAMETERS: Mapping[str, Mapping[str, Any]] = {"a-gem": {"batch": 8}}
INTENTS = 11
RATES = (5e-4, 1e-3, 2e-3)
RATE_BOUNDS = (1.25e-4, 4e-3)
AS = {"single": "isolated", **dict.fromkeys(("replay", "ewc", "lwf", "a-gem", "migu"), "seq")}
"""Strategies that train as another does, or add to it, and have its rate."""
UNTRIED = ("frozen", "ranpac")
"""Nothing but heads learns."""
CHOICE_SEED = 100
HIGH_HEADS: Mapping[str, Any] = {"head_learning_rate": 1e-2}
PROBED_HEADS: Mapping[str, Any] = {"head_start": "probe"}


@dataclass(frozen=True, slots=True)
class Setting:
    """Tasks, what is known of a row at test, and where adapters sit."""

    scenario: Scenario
    tasks: tuple[str, ...]
    targets: tuple[str, ...] = ("all",)
    only: tuple[str, ...] = ()
    """Strategies that are run here; none: all."""
    heads: Mapping[str, Any] = field(default_factory=lambda: HIGH_HEADS)
    """How heads are trained."""
    choice: str = "choice"
    """The setting that rates are chosen in; none: this is one."""


CHOSEN = tuple(f"wheel:{name}" for name in ("trec", "disaster", "banking77"))
SEVEN = tuple(
    f"wheel:{name}" for name in ("trec", "rotten-tomatoes", "sms", "disaster", "banking77", "20newsgroups", "snli")
)
LENGTHS = {"wheel:20newsgroups": 64}
"""Texts are cut here where the sample's own limit is longer: they would take most of the time."""
SETTINGS: Mapping[str, Setting] = {
    "choice": Setting("task", CHOSEN, choice=""),
    "choice-probed": Setting("task", CHOSEN, heads=PROBED_HEADS, choice=""),
    "tasks": Setting("task", SEVEN),
    "small": Setting("task", SEVEN, ("qv",), ("seq", "isolated", "frozen", "single")),
    "probed": Setting("task", SEVEN, only=("seq", "isolated", "frozen"), heads=PROBED_HEADS, choice="choice-probed"),
    "valence": Setting("domain", tuple(f"wheel:valence-{name}" for name in ("tweets", "amazon", "movie", "nyt"))),
    "classes": Setting("class", tuple(f"intents-{number}.yaml" for number in range(7))),
}
MEASURED = tuple(name for name, setting in SETTINGS.items() if setting.choice)
"""Settings that the results are of."""


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
    rate: float
    """Highest learning rate of all but the heads."""
    budget: Budget

    def folder(self, root: Path) -> Path:
        """Its own, for this budget."""
        size = "-".join(str(value) for value in asdict(self.budget).values())
        own = f"{self.strategy}-order{self.order}-seed{self.seed}-rate{self.rate:g}"
        return root / f"{self.setting}-{size}" / own

    def __str__(self) -> str:
        return f"{self.setting} {self.strategy} order {self.order} seed {self.seed} rate {self.rate:g}"


def main() -> None:
    """Run what is not there yet, and report."""
    options = arguments()
    if options.one:
        given = json.loads(options.one)
        run_one(options.folder, Job(**{**given, "budget": Budget(**given["budget"])}))
        return
    budget = Budget(options.rows, options.tests, options.steps)
    rates, tried = ({}, []) if options.rate else chosen_rates(options, budget)
    jobs = list(jobs_of(options, budget, rates))
    do(options, jobs)
    if options.list:
        return
    runs = [finished(options.folder, job) for job in jobs if is_done(options.folder, job)]
    trials = [finished(options.folder, job) for job in tried]
    write_report(runs, trials, None if options.no_write else Path(__file__).parent / "results")


def do(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Run jobs that are not done, each in a process of its own; or only say what would run."""
    for number, job in enumerate(jobs if not options.only_report else [], 1):
        if options.list:
            print(job)
        elif not is_done(options.folder, job):
            print(f"{number}/{len(jobs)} {job}", file=sys.stderr)
            command = [sys.executable, __file__, "--folder", str(options.folder), "--one", json.dumps(asdict(job))]
            subprocess.run(command, check=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-continual"), help="keeps runs and adapters")
    parser.add_argument("--setting", choices=MEASURED, action="append", help="any number of times; by default all")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="of the strategies that are run in several")
    parser.add_argument("--rows", type=int, default=500, help="training rows a task")
    parser.add_argument("--tests", type=int, default=100, help="test rows a task")
    parser.add_argument("--steps", type=int, default=120, help="steps of 8 rows a task")
    parser.add_argument("--rate", type=float, help="one learning rate for all, instead of one chosen for each")
    parser.add_argument("--only-report", action="store_true", help="run nothing: report what is there")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen_rates(options: argparse.Namespace, budget: Budget) -> tuple[dict[tuple[str, str], float], list[Job]]:
    """The rate of every strategy in every setting that rates are chosen in, and what was run to choose it."""
    rates, tried = {}, []
    runs = runs_of(options)
    for setting, strategy in dict.fromkeys((SETTINGS[own].choice, AS.get(name, name)) for own, name in runs):
        trials = [] if strategy in UNTRIED else trials_of(options, setting, strategy, budget)
        rates[setting, strategy] = best_of(options.folder, trials)
        tried += trials
    return rates, tried


def runs_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Settings and strategies that are run there; strategies that cannot do a scenario are not."""
    return [
        (name, strategy)
        for name in options.setting or MEASURED
        for strategy in options.strategies.split(",")
        if not SETTINGS[name].only or strategy in SETTINGS[name].only
        if SETTINGS[name].scenario in strategy_of(strategy).needs.scenarios
    ]


def trials_of(options: argparse.Namespace, setting: str, strategy: str, budget: Budget) -> list[Job]:
    """Try rates until the best is between others, or at a bound; what is done of it."""
    rates: tuple[float, ...] = RATES
    tried: list[Job] = []
    while True:
        trials = [Job(setting, strategy, 0, CHOICE_SEED, rate, budget) for rate in rates]
        do(options, [job for job in trials if job not in tried])
        tried += trials
        done = [job for job in trials if is_done(options.folder, job)]
        best = best_of(options.folder, done)
        if len(done) < len(trials) or best in (*rates[1:-1], *RATE_BOUNDS):
            return done
        rates = (best / 2, *rates) if best == rates[0] else (*rates, 2 * best)


def best_of(root: Path, trials: Sequence[Job]) -> float:
    """The rate with the highest ACC on held-out rows; of equal ones the lowest.

    Before anything is tried, the highest: so that --list can say what would run.
    """
    return max(trials, key=lambda job: (acc(root, job), -job.rate)).rate if trials else RATES[-1]


def acc(root: Path, job: Job) -> float:
    """Its ACC, the task told."""
    return load_report(job.folder(root) / "run").summary.acc


def jobs_of(options: argparse.Namespace, budget: Budget, rates: Mapping[tuple[str, str], float]) -> Iterator[Job]:
    """All runs."""
    for setting, strategy in runs_of(options):
        rate = options.rate or rates[SETTINGS[setting].choice, AS.get(strategy, strategy)]
        for order in range(options.orders):
            seeded = setting == "tasks" and strategy in SEEDED and not order
            for seed in range(options.seeds if seeded else 1):
                yield Job(setting, strategy, order, seed, rate, budget)


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
    train: dict[str, Any] = {"batch_size": 8, "learning_rate": job.rate, **setting.heads}
    if job.strategy == "joint":
        # its rows grow with the tasks: as many steps a task as the others
        train["epochs"] = 8 * job.budget.steps / job.budget.rows
    else:
        train["max_steps"] = job.budget.steps
    return TaskSequence(
        name=job.setting,
        base=BASE,
        tasks=tasks_of(root, job),
        strategy=job.strategy,
        parameters=PARAMETERS.get(job.strategy, {}),
        scenario=setting.scenario,
        options={"rank": 8, "targets": list(setting.targets)},
        train=train,
        limits=Limits(train=job.budget.rows, test=job.budget.tests),
        seed=job.seed,
    )


def tasks_of(root: Path, job: Job) -> tuple[str, ...]:
    """The tasks of a setting, in one of the orders."""
    tasks = list(SETTINGS[job.setting].tasks)
    if job.order:
        random.Random(job.order).shuffle(tasks)
    if job.setting == "classes":
        files = {Path(file).name: file for file in split_intents(root / "intents", INTENTS)}
        return tuple(files[task] for task in tasks)
    if not SETTINGS[job.setting].choice:
        folder = root / f"held-out-{job.budget.rows}-{job.budget.tests}"
        return tuple(held_out(folder, task, job.budget.rows, job.budget.tests, CHOICE_SEED) for task in tasks)
    return tuple(shortened(root / "shortened", task, LENGTHS[task]) if task in LENGTHS else task for task in tasks)


def is_done(root: Path, job: Job) -> bool:
    """Whether it has run to its end."""
    return (job.folder(root) / "cost.json").exists()


def finished(root: Path, job: Job) -> CostedRun:
    """A run that is done."""
    folder = job.folder(root)
    report: Report = load_report(folder / "run")
    return CostedRun(job.setting, job.order, job.rate, report, **json.loads((folder / "cost.json").read_text()))


if __name__ == "__main__":
    main()

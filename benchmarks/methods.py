"""Every way to train an adapter from rows, on the same tasks with the same budget: the table that surveys lack.

    OMP_NUM_THREADS=1 python benchmarks/methods.py                   # everything, some three hours of a core; goes on
    OMP_NUM_THREADS=1 python benchmarks/methods.py --methods lora,dora --tasks trec --seeds 0 --no-write

Base: All-MiniLM-L6-v2, fp32. Tasks: TREC, Rotten Tomatoes, SNLI. Budget of every run: 400 training rows, three passes
in batches of 16; a seed draws the rows, their order and the initial tensors. Each method has the sizes of its section
in docs/methods.md. Its learning rate is looked for on 300 other training rows of TREC (one seed, which is not in the
table) and taken for all tasks: three around the one there, and on by factors of three while the best is at an end.
Accuracy on the same 400 test rows of a task for all.

The bounds: `linear probe` trains the head alone, `full fine-tuning` everything, in the plain model with transformers'
`Trainer`; their rates are looked for in the same way.

Numbers are those that learn, the head's not counted; seconds are CPU time of the training, on one thread. The results
go to benchmarks/results/methods.{json,md,png}.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_report import write_report
from rich.console import Console
from transformers import Trainer, TrainerCallback

from graftory.adapter import TaskInfo
from graftory.adapters import new_adapter
from graftory.adapters.table import METHODS
from graftory.config import AdapterConfig, LoraConfig
from graftory.data import Rows, TaskFile, load_rows, load_task
from graftory.settings import TrainSettings
from graftory.training import Hooks, Job, LoadedBase, evaluate, load_base, train
from graftory.training.encode import Collator, encode
from graftory.training.learning import training_arguments

BASE = "wheel:minilm"
TASKS = ("trec", "rotten-tomatoes", "snli")
CHOSEN_ON = "trec"
ROWS, EPOCHS, BATCH, TESTS, HELD_OUT = 400, 3.0, 16, 400, 300
CHOICE_SEED, MOST_RATES = 99, 6
PROBE, FULL = "linear probe", "full fine-tuning"
CONSOLE = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table.

    Attributes:
        name: The method, or a bound.
        rate: The learning rate that its section names, from which the best is looked for.
        options: Of its configuration, where they are not the defaults.
    """

    name: str
    rate: float = 2e-3
    options: Mapping[str, Any] = field(default_factory=dict)


ENTRIES = (
    Entry(PROBE, 5e-2),
    Entry(FULL, 3e-4),
    *(Entry("lora"), Entry("lora_bias"), Entry("dora"), Entry("ia3", 2e-2), Entry("bitfit", 5e-3)),
    *(Entry("ln_tuning", 1e-2), Entry("bottleneck"), Entry("compacter", 5e-3), Entry("krona", 5e-3)),
    *(Entry("prefix", 1e-2), Entry("apt"), Entry("prompt", 5e-2), Entry("p_tuning", 5e-3), Entry("unipelt")),
    *(Entry("dylora", 5e-3), Entry("sora", options={"rank": 16, "sparsity": 2.0}), Entry("adalora", 5e-3)),
    *(Entry("adapterdrop"), Entry("sparse", options={"size": 192, "pruned": 0.75}), Entry("adamix")),
    *(Entry("lokr", 5e-3), Entry("loha", 5e-3), Entry("vera", 1e-2), Entry("vblora", 1e-2)),
    *(Entry("fourierft", 1e-2), Entry("oft", 1e-3), Entry("hra", 5e-3)),
    *(Entry("diff", 5e-3), Entry("spt", 5e-3), Entry("propetl", 5e-3), Entry("coda")),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One training: of which row of the table, on what, at which rate."""

    entry: Entry
    task: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """What its figures are stored under."""
        return f"{self.entry.name}|{self.task}|{self.seed}|{self.rate:.3g}"


@dataclass(frozen=True, slots=True)
class Figures:
    """What a training gave."""

    accuracy: float
    loss: float
    numbers: int
    seconds: float


class Counted(TrainerCallback):
    """Counts the numbers that learn, but for a head's."""

    def __init__(self) -> None:
        self.numbers = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at what has gradients."""
        del args, state, control
        learning = [(name, weight) for name, weight in given["model"].named_parameters() if weight.requires_grad]
        self.numbers = sum(weight.numel() for name, weight in learning if not is_head(name))


def is_head(name: str) -> bool:
    """Whether a parameter is of the classifier, in the plain model or beside it."""
    return "classifier" in name or "head" in name


def main() -> None:
    """Train what is not there yet, and report."""
    options = arguments()
    entries = chosen_entries(options.methods)
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.folder / "figures.jsonl")
    seeds, tasks = [int(seed) for seed in options.seeds.split(",")], options.tasks.split(",")
    tried = {entry.name: rates_tried(kept, entry) for entry in entries}
    rates = {name: best_rate(found) for name, found in tried.items()}
    cells = [Cell(entry, task, seed, rates[entry.name]) for task in tasks for seed in seeds for entry in entries]
    for number, cell in enumerate(cells, 1):
        if not options.only_report:
            kept.figures_of(cell, f"{number}/{len(cells)}")
    runs = [{**asdict(kept.figures_of(cell, "")), **described(cell)} for cell in cells if kept.has(cell)]
    accuracies = {name: {f"{rate:.3g}": one.accuracy for rate, one in found.items()} for name, found in tried.items()}
    write_report(runs, accuracies, None if options.no_write else Path(__file__).parent / "results")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-methods"), help="keeps figures")
    parser.add_argument("--methods", default=",".join(entry.name for entry in ENTRIES))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only-report", action="store_true", help="train nothing: report what is there")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def chosen_entries(names: str) -> list[Entry]:
    """The rows that were asked for, in the table's order."""
    wanted = names.split(",")
    unknown = set(wanted) - {entry.name for entry in ENTRIES}
    if unknown:
        raise SystemExit(f"no method {sorted(unknown)[0]!r}; known: {', '.join(entry.name for entry in ENTRIES)}")
    return [entry for entry in ENTRIES if entry.name in wanted]


def rates_tried(kept: Kept, entry: Entry) -> dict[float, Figures]:
    """The rate of the section, a third and three times it, and on in the direction of the best until it has both
    neighbours; by rate.
    """
    steps = {-1, 0, 1}
    while True:
        found = {
            step: kept.figures_of(Cell(entry, CHOSEN_ON, CHOICE_SEED, entry.rate * 3.0**step), "rate") for step in steps
        }
        best = max(found, key=lambda step: (found[step].accuracy, -found[step].loss))
        around = {best - 1, best + 1} - steps
        if not around or len(steps) >= MOST_RATES:
            return {entry.rate * 3.0**step: found[step] for step in sorted(found)}
        steps |= around


def best_rate(tried: Mapping[float, Figures]) -> float:
    """The rate with the best accuracy on held-out rows, of equals that of the smaller loss."""
    return max(tried, key=lambda rate: (tried[rate].accuracy, -tried[rate].loss))


def described(cell: Cell) -> dict[str, Any]:
    """What a run was, for the results."""
    return {
        "method": cell.entry.name,
        "task": cell.task,
        "seed": cell.seed,
        "learning_rate": cell.rate,
        "options": dict(cell.entry.options),
    }


class Kept:
    """Figures in a file, a line each; what is not there is trained."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._figures: dict[str, Figures] = {}
        self._read()

    def figures_of(self, cell: Cell, what: str) -> Figures:
        """Those of a training."""
        if cell.key not in self._figures:
            self._read()  # another process may have trained it
        if cell.key not in self._figures:
            CONSOLE.print(what, cell.key)
            self._figures[cell.key] = trained(cell)
            with self._file.open("a") as file:
                file.write(json.dumps({"key": cell.key, **asdict(self._figures[cell.key])}) + "\n")
        return self._figures[cell.key]

    def has(self, cell: Cell) -> bool:
        """Whether it has been trained."""
        return cell.key in self._figures

    def _read(self) -> None:
        for line in self._file.read_text().splitlines() if self._file.exists() else ():
            values = json.loads(line)
            key = values.pop("key")
            self._figures[key] = Figures(**values)


@cache
def base() -> LoadedBase:
    """The base, loaded once; adapters leave it as it is."""
    return load_base(BASE, "classification")


@cache
def rows_of(task: TaskFile, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and to measure on. The choice of a rate never sees test rows."""
    everything = load_rows(task, "train")
    if seed != CHOICE_SEED:
        return everything.subsample(ROWS, seed), load_rows(task, "test", limit=TESTS)
    both = everything.subsample(ROWS + HELD_OUT, seed)
    own = both.subsample(ROWS, seed + 1)
    taken = {(text, target) for text, target in zip(own.texts, own.targets, strict=True)}
    left = [pair for pair in zip(both.texts, both.targets, strict=True) if pair not in taken]
    texts, targets = zip(*left, strict=True)
    return own, replace(own, texts=texts, targets=targets)


def trained(cell: Cell) -> Figures:
    """Train and measure."""
    task = load_task(f"wheel:{cell.task}")
    training, test = rows_of(task, cell.seed)
    settings = TrainSettings(epochs=EPOCHS, batch_size=BATCH, learning_rate=cell.rate, seed=cell.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of methods that it runs
        return WAYS.get(cell.entry.name, adapters_way)(Work(cell.entry, task, training, test, settings))


@dataclass(frozen=True, slots=True)
class Work:
    """What a way to train is given."""

    entry: Entry
    task: TaskFile
    training: Rows
    test: Rows
    settings: TrainSettings


def adapters_way(work: Work, frozen: Sequence[str] = ()) -> Figures:
    """As `hub train` does it."""
    kind: Any = METHODS.get(work.entry.name, METHODS["lora"]).config
    config: AdapterConfig = kind(init_seed=work.settings.seed, **work.entry.options)
    counted, hooks = Counted(), Hooks(frozen=tuple(frozen))
    began = time.process_time()
    adapter = train(
        *(base(), work.task, work.training, config, work.settings),
        name=work.entry.name,
        hooks=hooks,
        callbacks=(counted,),
    )
    seconds = time.process_time() - began
    ((accuracy, loss),) = evaluate(base(), [Job("it", adapter, None, work.task, work.test)])
    return Figures(accuracy.value, loss.value, counted.numbers, seconds)


def probe_way(work: Work) -> Figures:
    """A LoRA whose body never leaves its start, where its update is exactly zero: the head alone learns."""
    return adapters_way(work, LoraConfig.parts)


def full_way(work: Work) -> Figures:
    """A copy of the plain model in which everything learns, from the same head as an adapter's."""
    loaded, info = base(), work.training.info(work.task)
    head = new_adapter(loaded.model, LoraConfig(init_seed=work.settings.seed), task=info, base=loaded.base)
    model: Any = copy.deepcopy(loaded.model).requires_grad_(True)
    model.classifier = torch.nn.Linear(model.config.hidden_size, info.outputs)
    model.classifier.load_state_dict({key.rsplit(".", 1)[1]: tensor for key, tensor in head.head_tensors().items()})
    model.num_labels = model.config.num_labels = info.outputs
    counted = Counted()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            training_arguments(work.settings, Path(folder), keep=False),
            data_collator=Collator(loaded.tokenizer.pad_token_id),
            train_dataset=examples_of(loaded, info, work.training),
            callbacks=[counted],
        )
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        outcome = trainer.predict(examples_of(loaded, info, work.test))
    right = np.asarray(outcome.predictions).argmax(-1) == outcome.label_ids
    return Figures(float(right.mean()), float((outcome.metrics or {})["test_loss"]), counted.numbers, seconds)


def examples_of(loaded: LoadedBase, info: TaskInfo, rows: Rows) -> Any:
    """Rows as the collator takes them."""
    return [encode(loaded.tokenizer, info, *row) for row in zip(rows.texts, rows.targets, strict=True)]


WAYS: Mapping[str, Callable[[Work], Figures]] = {PROBE: probe_way, FULL: full_way}
"""The bounds, which are no methods of the hub."""


if __name__ == "__main__":
    main()

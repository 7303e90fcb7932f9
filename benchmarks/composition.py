"""Few rows of a new task, and adapters of others: what composing them brings.

    python benchmarks/composition.py                    # everything; resumable, --folder keeps what is done
    python benchmarks/composition.py --setting family   # the second setting
    python benchmarks/composition.py --targets valence-nyt --sizes 10 --seeds 0 --no-write   # a quick look

Base: All-MiniLM-L6-v2, fp32. Targets: valence of tweets, of Amazon reviews and of film reviews (negative or positive),
10, 50 and 200 rows, and 400 test rows of each. Sources are bottleneck adapters (pfeiffer, 48 units), 1000 rows each, 2
epochs, of

- `tasks`: TREC, Rotten Tomatoes, SMS spam, disaster tweets, SNLI and 20 newsgroups, from one initialisation;
- `family`: Rotten Tomatoes and the valence domains that are not the target (New York Times among them), each from an
  initialisation of its own, as if different people had trained them; 10 and 50 rows.

Everything that is trained gets 60 steps of 8 rows; learning rates were chosen on valence of the New York
Times, which is no target. A seed draws the rows, the head, fresh adapters and the order of the rows; the sources are
the same for all.

Soups, MerA and single adapters are trained on after composing, with a new head, as MerA's paper does; AdapterFusion
learns its attention and the head, a hyperformer of the same six tasks an embedding and the head, SMoP its prompts from
nothing; the probe is a logistic regression on mean-pooled states.

The results go to benchmarks/results/composition{,_family}.{json,md,png}: mean and standard deviation over seeds, the
mean paired difference to a fresh adapter with its standard error over targets and seeds, CPU time of the training, and
CPU time of the answers beside a fresh adapter's. `tasks` takes about 100 minutes on one core, `family` about 30, and
their sources 15: two of them can run beside each other with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from composition_methods import CONFIG, FAMILY, FAMILY_ONLY, METHODS, Given
from composition_report import write_report
from rich.console import Console
from torch import Tensor

from graftory import Adapter, Hub
from graftory.compose.hyperformer import hyperformer
from graftory.compose.select import Domain, example_texts
from graftory.config import HyperformerConfig
from graftory.data import load_rows, load_task
from graftory.settings import HyperformerSettings, TrainSettings
from graftory.training import LoadedBase, load_base, train
from graftory.training.features import features_of

BASE = "wheel:minilm"
TARGETS = ("valence-tweets", "valence-amazon", "valence-movie")
SEEDS = (0, 1, 2)
SOURCE_ROWS, TEST_ROWS, EXAMPLES = 1000, 400, 100
CONSOLE = Console(stderr=True)
Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """Which adapters there are to compose.

    Attributes:
        file: What its results are called.
        sources: Tasks of the adapters; a target is never its own source.
        sizes: Training rows of the target.
        methods: What is compared.
        prefix: Of the adapters' names in the hub.
        one_init: Whether all started from the same tensors.
    """

    file: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    prefix: str = ""
    one_init: bool = True


SETTINGS = {
    "tasks": Setting(
        file="composition",
        sources=("trec", "rotten-tomatoes", "sms", "disaster", "snli", "20newsgroups"),
        sizes=(10, 50, 200),
        methods=tuple(name for name in METHODS if name not in FAMILY_ONLY),
    ),
    "family": Setting(
        file="composition_family",
        sources=("rotten-tomatoes", "valence-nyt", *TARGETS),
        sizes=(10, 50),
        methods=FAMILY,
        prefix="family-",
        one_init=False,
    ),
}


def main() -> None:
    """Run what is not there yet, and report."""
    options = parse()
    setting: Setting = SETTINGS[options.setting]
    methods = options.methods or setting.methods
    options.folder.mkdir(parents=True, exist_ok=True)
    done_file = options.folder / f"{setting.file}.jsonl"
    done = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    keys = {key_of(run) for run in done}
    grid = [
        (target, size, seed, method)
        for seed in options.seeds
        for size in options.sizes or setting.sizes
        for target in options.targets
        for method in methods
    ]
    missing = [key for key in grid if key not in keys]
    if missing:
        bench = Bench(setting, load_base(BASE, "classification"), Hub.create(options.folder / "hub"))
        for number, key in enumerate(missing, 1):
            began = time.perf_counter()
            run = bench.run(*key)
            with done_file.open("a") as file:
                file.write(json.dumps(run) + "\n")
            done.append(run)
            name = " ".join(map(str, key))
            spent = time.perf_counter() - began
            CONSOLE.print(f"{number}/{len(missing)} {name}: {run['accuracy']:.3f} ({spent:.0f} s)")
    runs = [run for run in done if key_of(run) in set(grid)]
    command = "python benchmarks/composition.py" + (
        "" if options.setting == "tasks" else f" --setting {options.setting}"
    )
    folder = None if options.no_write else Path(__file__).parent / "results"
    write_report(runs, methods, command, folder, setting.file)


def key_of(run: Run) -> tuple[str, int, int, str]:
    """What makes a run the same as another."""
    return run["target"], run["size"], run["seed"], run["method"]


class Bench:
    """The base, the sources, and what is known of the targets; each made when it is first needed."""

    def __init__(self, setting: Setting, loaded: LoadedBase, hub: Hub) -> None:
        self.setting, self.loaded, self.hub = setting, loaded, hub
        self.features: dict[str, Tensor] = {}

    def run(self, target: str, size: int, seed: int, method: str) -> Run:
        """One cell of the grid."""
        task = load_task(f"wheel:{target}")
        names = [name for name in self.setting.sources if name != target]
        given = Given(
            loaded=self.loaded,
            sources={name: self.source(name) for name in names},
            hyper=self.hyperformer,
            domains=[Domain(name, self.examples(name)) for name in names],
            examples=self.examples(target),
            task=task,
            rows=load_rows(task, "train", limit=size, seed=seed),
            test=load_rows(task, "test", limit=TEST_ROWS),
            seed=seed,
        )
        return {"target": target, "size": size, "seed": seed, "method": method, **asdict(METHODS[method](given))}

    def examples(self, name: str) -> Tensor:
        """Features of unlabelled examples of a task."""
        if name not in self.features:
            self.features[name] = features_of(self.loaded, example_texts(f"wheel:{name}", EXAMPLES))
        return self.features[name]

    def source(self, name: str) -> Adapter:
        """The adapter of another task, trained once and kept in the hub."""
        kept = self.setting.prefix + name
        if kept not in {row.name for row in self.hub.index()}:
            CONSOLE.print(f"training {kept}")
            task = load_task(f"wheel:{name}")
            rows = load_rows(task, "train", limit=SOURCE_ROWS, seed=0)
            seed = 0 if self.setting.one_init else 1 + self.setting.sources.index(name)
            settings = TrainSettings(epochs=2.0, seed=seed)
            self.hub.put(kept, train(self.loaded, task, rows, replace(CONFIG, init_seed=seed), settings, name=kept))
        return self.hub.get(kept)

    def hyperformer(self) -> Adapter:
        """A hyperformer of the same tasks and rows, for as many steps as the adapters had together."""
        if "hyper" not in {row.name for row in self.hub.index()}:
            CONSOLE.print("training the hyperformer")
            tasks = [load_task(f"wheel:{name}") for name in self.setting.sources]
            rows = [load_rows(task, "train", limit=SOURCE_ROWS, seed=0) for task in tasks]
            config, settings = HyperformerConfig(size=CONFIG.size), HyperformerSettings(epochs=2.0, seed=0)
            self.hub.put("hyper", hyperformer(self.loaded, list(zip(tasks, rows, strict=True)), config, settings))
        return self.hub.get("hyper")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-composition"), help="keeps sources and runs")
    parser.add_argument("--setting", choices=SETTINGS, default="tasks")
    parser.add_argument("--targets", type=texts, default=TARGETS)
    parser.add_argument("--sizes", type=numbers)
    parser.add_argument("--seeds", type=numbers, default=SEEDS)
    parser.add_argument("--methods", type=texts, help="rows of the table, separated by ;")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def texts(value: str) -> Sequence[str]:
    """`a;b`."""
    return [item.strip() for item in value.split(";")]


def numbers(value: str) -> Sequence[int]:
    """`1,2`."""
    return [int(item) for item in value.split(",")]


if __name__ == "__main__":
    main()

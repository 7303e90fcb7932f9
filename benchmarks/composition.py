"""Few rows of a new task, and adapters of six others: what composing them brings.

    python benchmarks/composition.py                    # everything; resumable, --folder keeps what is done
    python benchmarks/composition.py --targets valence-nyt --sizes 10 --seeds 0 --no-write   # a quick look

Base: All-MiniLM-L6-v2, fp32. Sources: bottleneck adapters (pfeiffer, 48 units, one initialisation) on TREC, Rotten
Tomatoes, SMS spam, disaster tweets, SNLI and 20 newsgroups, 1000 rows each, 2 epochs. Targets: valence of tweets, of
Amazon reviews and of film reviews (negative or positive), 10, 50 and 200 rows, and 400 test rows of each. Everything
that is trained gets 60 steps of at most 16 rows; learning rates were chosen on valence of the New York Times, which is
no target. A seed draws the rows, the head, fresh adapters and the order of the rows; the sources are the same for all.

Soups, MerA and single adapters are trained on after composing, with a new head, as MerA's paper does; AdapterFusion
learns its attention and the head, a hyperformer of the same six tasks an embedding and the head, SMoP its prompts from
nothing; the probe is a logistic regression on mean-pooled states.

The results go to benchmarks/results/composition.{json,md,png}: mean and standard deviation over seeds, and the mean
paired difference to a fresh adapter with its standard error over targets and seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from composition_methods import CONFIG, METHODS, Given
from composition_report import write_report
from rich.console import Console

from graftory import Adapter, Hub
from graftory.compose.hyperformer import hyperformer
from graftory.compose.select import Domain, example_texts
from graftory.config import HyperformerConfig
from graftory.data import load_rows, load_task
from graftory.settings import HyperformerSettings, TrainSettings
from graftory.training import LoadedBase, load_base, train
from graftory.training.features import features_of

BASE = "wheel:minilm"
SOURCES = ("trec", "rotten-tomatoes", "sms", "disaster", "snli", "20newsgroups")
TARGETS = ("valence-tweets", "valence-amazon", "valence-movie")
SIZES = (10, 50, 200)
SEEDS = (0, 1, 2)
SOURCE_ROWS, TEST_ROWS, EXAMPLES = 1000, 400, 100


def main() -> None:
    """Run what is not there yet, and report."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    done_file = options.folder / "runs.jsonl"
    done = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    keys = {(run["target"], run["size"], run["seed"], run["method"]) for run in done}
    grid = [
        (target, size, seed, method)
        for seed in options.seeds
        for size in options.sizes
        for target in options.targets
        for method in (options.methods or METHODS)
    ]
    missing = [key for key in grid if key not in keys]
    console = Console(stderr=True)
    if missing:
        loaded = load_base(BASE, "classification")
        sources = trained_sources(loaded, Hub.create(options.folder / "hub"), console)
        hyper = trained_hyperformer(loaded, Hub.open(options.folder / "hub"), console)
        domains = [Domain(name, features_of(loaded, example_texts(f"wheel:{name}", EXAMPLES))) for name in SOURCES]
        examples = {t: features_of(loaded, example_texts(f"wheel:{t}", EXAMPLES)) for t in options.targets}
    for number, (target, size, seed, method) in enumerate(missing, 1):
        task = load_task(f"wheel:{target}")
        rows, test = load_rows(task, "train", limit=size, seed=seed), load_rows(task, "test", limit=TEST_ROWS)
        began = time.perf_counter()
        found = METHODS[method](Given(loaded, sources, hyper, domains, examples[target], task, rows, test, seed))
        run = {"target": target, "size": size, "seed": seed, "method": method}
        run |= {key: getattr(found, key) for key in ("accuracy", "parameters", "seconds", "answering", "note")}
        with done_file.open("a") as file:
            file.write(json.dumps(run) + "\n")
        done.append(run)
        spent = time.perf_counter() - began
        console.print(
            f"{number}/{len(missing)} {target} {size} seed {seed} {method}: {found.accuracy:.3f} ({spent:.0f} s)"
        )
    wanted = set(grid)
    runs = [run for run in done if (run["target"], run["size"], run["seed"], run["method"]) in wanted]
    write_report(runs, list(METHODS), None if options.no_write else Path(__file__).parent / "results")


def trained_sources(loaded: LoadedBase, hub: Hub, console: Console) -> dict[str, Adapter]:
    """The adapters of the other tasks, trained once and kept in a hub."""
    known = {row.name for row in hub.index()}
    for name in SOURCES:
        if name not in known:
            task = load_task(f"wheel:{name}")
            console.print(f"training {name}")
            rows = load_rows(task, "train", limit=SOURCE_ROWS, seed=0)
            hub.put(name, train(loaded, task, rows, CONFIG, TrainSettings(epochs=2.0, seed=0), name=name))
    return {name: hub.get(name) for name in SOURCES}


def trained_hyperformer(loaded: LoadedBase, hub: Hub, console: Console) -> Adapter:
    """A hyperformer of the same tasks and rows, for as many steps as the adapters had together."""
    if "hyper" not in {row.name for row in hub.index()}:
        console.print("training the hyperformer")
        tasks = [load_task(f"wheel:{name}") for name in SOURCES]
        rows = [load_rows(task, "train", limit=SOURCE_ROWS, seed=0) for task in tasks]
        config, settings = HyperformerConfig(size=CONFIG.size), HyperformerSettings(epochs=2.0, seed=0)
        hub.put("hyper", hyperformer(loaded, list(zip(tasks, rows, strict=True)), config, settings))
    return hub.get("hyper")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-composition"), help="keeps sources and runs")
    parser.add_argument("--targets", type=texts, default=TARGETS)
    parser.add_argument("--sizes", type=numbers, default=SIZES)
    parser.add_argument("--seeds", type=numbers, default=SEEDS)
    parser.add_argument("--methods", type=texts, help="rows of the table, separated by ;")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(torch.get_num_threads())
    return options


def texts(value: str) -> Sequence[str]:
    """`a;b`."""
    return [item.strip() for item in value.split(";")]


def numbers(value: str) -> Sequence[int]:
    """`1,2`."""
    return [int(item) for item in value.split(",")]


if __name__ == "__main__":
    main()

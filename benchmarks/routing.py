"""Which features and which classifier tell a row's task best, and what telling it costs.

    python benchmarks/routing.py                       # all settings, results in benchmarks/results/routing.json
    python benchmarks/routing.py --setting valence
    python benchmarks/routing.py --rows 100 --tests 50 --no-write

Base: All-MiniLM-L6-v2, fp32, no adapter, one thread. Settings: the seven tasks, the four valence domains and banking77
in seven tasks of eleven intents, as in benchmarks/continual.py. Every number is the share of test rows, mean over the
tasks, that are sent to their own task:

- `layers`: the router, on the mean-pooled states of each layer and of four layers joined; which of them held-out rows
  choose; and for comparison with centroids that are not drawn to their task's mean, with one or five k-means centroids
  a task in place of one for each label, and ridge regression on task ids (of the same features, and of 1000 random ones
  as in RanPAC, λ by held-out rows).
- `rows`: the chosen layers with fewer training rows.
- `abstained`: of the rows of known tasks, and of each task when the router was fitted without it.
- `milliseconds`: CPU time a row, forward pass and classifier apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from continual import INTENTS, SETTINGS
from intents import split_intents
from torch import Tensor

from graftory.continual.ridge import Moments, choose_strength, projected, random_projection, solve
from graftory.continual.router import ABSTAIN, Router, RouterSettings
from graftory.data import load_rows, load_task
from graftory.training import load_base
from graftory.training.features import depth_of, layer_features_of
from graftory.versions import library_versions

BASE = "wheel:minilm"
RANDOM = 1000
HELD_OUT = 5
ROUTED = ("tasks", "valence", "classes")
"""Settings in which a row's task may have to be found."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Pooled states of a task's rows at every layer, [rows, layers, width]."""

    name: str
    train: Tensor
    labels: Tensor
    held: Tensor
    test: Tensor
    seconds: float
    """CPU time of the forward passes."""


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(1)
    loaded = load_base(BASE, "classification")
    found = {}
    for setting in options.setting or ROUTED:
        with TemporaryDirectory() as folder:
            tasks = [read(loaded, source, options.rows, options.tests) for source in sources(setting, Path(folder))]
        rows = sum(len(task.train) + len(task.held) + len(task.test) for task in tasks)
        found[setting] = measured(tasks, depth_of(loaded))
        found[setting]["milliseconds"] |= {"forward": 1000 * sum(task.seconds for task in tasks) / rows}
        print(setting, json.dumps(found[setting], indent=1))
    if not options.no_write:
        machine = {"system": platform.system(), "processor": platform.machine(), "libraries": library_versions()}
        budget = {"base": BASE, "rows": options.rows, "tests": options.tests}
        path = Path(__file__).parent / "results" / "routing.json"
        path.write_text(json.dumps({"machine": machine, **budget, **found}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=ROUTED, action="append", help="any number of times; by default all")
    parser.add_argument("--rows", type=int, default=500, help="training rows a task, at most")
    parser.add_argument("--tests", type=int, default=500, help="test rows a task, at most")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def sources(setting: str, folder: Path) -> Sequence[str]:
    """The tasks of a setting; some are written to a folder first."""
    return split_intents(folder, INTENTS) if setting == "classes" else SETTINGS[setting].tasks


def read(loaded: Any, source: str, rows: int, tests: int) -> Task:
    """Features of a task; every fifth training row is held out, as a run does."""
    task, layers = load_task(source), range(depth_of(loaded) + 1)
    train, test = load_rows(task, "train", limit=rows), load_rows(task, "test", limit=tests)
    began = time.process_time()
    states, tested = (layer_features_of(loaded, part.texts, layers) for part in (train, test))
    seconds, labels = time.process_time() - began, torch.tensor(train.targets)
    held = torch.arange(len(states)) % HELD_OUT == HELD_OUT - 1
    return Task(task.name, states[~held], labels[~held], states[held], tested, seconds)


def measured(tasks: Sequence[Task], depth: int) -> dict[str, Any]:
    """Everything but the forward pass."""
    settings = RouterSettings(quantile=1)
    views = settings.views(depth)
    auto = fitted(tasks, settings, depth)
    layers = {str(list(view)): of_layers(tasks, view, depth) for view in views}
    chosen = auto.view.layers
    own = fitted(tasks, RouterSettings(layers=chosen), depth)
    everything = torch.cat([picked(task.test, chosen) for task in tasks])
    began = time.process_time()
    own.route(everything)
    seconds = time.process_time() - began
    sizes = [size for size in (100, 300, 1000) if size < max(len(task.train) for task in tasks)]
    return {
        "tasks": {task.name: len(task.train) + len(task.held) for task in tasks},
        "layers": layers,
        "chosen": list(chosen),
        "held_out": {str(list(view.layers)): view.right / auto.held_out for view in auto.views},
        "right": {task.name: value for task, value in zip(tasks, shares(tasks, auto), strict=True)},
        "rows": {
            size: fmean(shares(tasks, fitted([cut(task, size) for task in tasks], settings, depth))) for size in sizes
        },
        "abstained": {
            "known": fmean(abstained(own, picked(task.test, chosen)) for task in tasks),
            "foreign": {task.name: foreign(tasks, task, chosen, depth) for task in tasks},
        },
        "milliseconds": {"classifier": 1000 * seconds / len(everything)},
    }


def of_layers(tasks: Sequence[Task], layers: tuple[int, ...], depth: int) -> dict[str, float]:
    """Every classifier on the same features."""
    settings = RouterSettings(layers=layers, quantile=1)
    narrow = [replace_states(task, layers) for task in tasks]
    ways: Mapping[str, Callable[[], Sequence[float]]] = {
        "centroid a label": lambda: shares(narrow, fitted(narrow, settings, depth)),
        "not smoothed": lambda: shares(narrow, fitted(narrow, replace(settings, smoothing=0), depth)),
        "5 k-means centroids": lambda: shares(narrow, fitted(narrow, settings, depth, labelled=False)),
        "1 centroid": lambda: shares(narrow, fitted(narrow, replace(settings, centroids=1), depth, labelled=False)),
        "ridge": lambda: ridge(narrow, 0),
        f"ridge on {RANDOM} random": lambda: ridge(narrow, RANDOM),
    }
    return {name: fmean(way()) for name, way in ways.items()}


def fitted(tasks: Sequence[Task], settings: RouterSettings, depth: int, *, labelled: bool = True) -> Router:
    """The router of these tasks, one after another."""
    router = Router.on(settings, depth)
    for task in tasks:
        train, held = (picked(states, router.layers) for states in (task.train, task.held))
        router = router.add(task.name, train, held, labels=task.labels if labelled else None)
    return router


def ridge(tasks: Sequence[Task], size: int) -> list[float]:
    """Ridge regression on one-hot task ids; every task counts the same."""
    projection = random_projection(tasks[0].train.flatten(1).shape[1], size, 0) if size else None

    def hidden(states: Tensor) -> Tensor:
        features = states.flatten(1)
        own = features if projection is None else projected(features, projection)
        return torch.cat([own, own.new_ones(len(own), 1)], 1)

    sums = []
    for part in ("train", "held"):
        moments = Moments.none(len(hidden(tasks[0].train[:1])[0]))
        for number, task in enumerate(tasks):
            states = getattr(task, part)
            ids = torch.full((len(states),), number)
            moments = moments.add(hidden(states) / len(states) ** 0.5, ids, len(tasks))
            # both h and y carry the weight
            moments.sums[:, number] /= len(states) ** 0.5
        sums.append(replace(moments, rows=len(tasks)))
    weights = solve(sums[0] + sums[1], choose_strength(sums[0], sums[1]))
    return [
        float(((hidden(task.test).double() @ weights).argmax(1) == number).double().mean())
        for number, task in enumerate(tasks)
    ]


def shares(tasks: Sequence[Task], router: Router) -> list[float]:
    """Of each task's test rows, those sent to it."""
    routes = (router.route(picked(task.test, router.layers)).task for task in tasks)
    return [float((route == number).double().mean()) for number, route in enumerate(routes)]


def foreign(tasks: Sequence[Task], left_out: Task, layers: tuple[int, ...], depth: int) -> float:
    """Share of a task's rows on which a router abstains that does not know it."""
    others = [task for task in tasks if task is not left_out]
    return abstained(fitted(others, RouterSettings(layers=layers), depth), picked(left_out.test, layers))


def abstained(router: Router, states: Tensor) -> float:
    """Share of rows that go to the bare base."""
    return float((router.route(states).task == ABSTAIN).double().mean())


def cut(task: Task, size: int) -> Task:
    """The task with fewer training rows."""
    return replace(task, train=task.train[:size], labels=task.labels[:size])


def replace_states(task: Task, layers: tuple[int, ...]) -> Task:
    """The task as a router of these layers alone reads it."""
    return replace(
        task, train=picked(task.train, layers), held=picked(task.held, layers), test=picked(task.test, layers)
    )


def picked(states: Tensor, layers: Sequence[int]) -> Tensor:
    """States of some layers, [rows, layers, width]; all there are if they are those already."""
    ordered = sorted(layers)
    return states if states.shape[1] == len(ordered) else states[:, ordered]


if __name__ == "__main__":
    main()

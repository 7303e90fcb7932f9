"""What merges of six MiniLM adapters keep of each task: our methods beside PEFT's, on the same adapters and test rows.

Part `accuracy` of merging.py. Adapters are trained once and kept in a hub in `--folder`, so is every merge that is
measured: a run that was cut off goes on where it was.

Tasks: TREC, SMS spam, disaster tweets (three domains), and three of sentiment: Rotten Tomatoes, film reviews, tweets.
Merged are all pairs and all six, of equal ranks (16 each) and of mixed ones (4, 8, 16 in turn), to full rank and cut to
rank 16. Each task is read with its own head. Normalised accuracy: the merge's by that of the task's own adapter, the
mean over the merge's tasks. A row is a method at one weight for all; `auto` chooses by 16 to 128 training rows of each
task that the adapters have not seen, and looks at up to 1024 where an adapter alone may be the better. PEFT's `linear`,
`ties`, `dare_linear`, `dare_ties` and `magnitude_prune` refuse mixed ranks and give the rank of their parts; `cat`
gives the sum of ranks.

How `auto` decides was chosen on the merges of seeds 0 to 2. Those of seeds 3 to 5 were held back, and trained and
measured after that: --seeds 3,4,5 --test-rows 600 --budgets "rank 16" --methods "auto,pico,regmean,PEFT svd mean"
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import peft
import torch
from merging_accuracy_report import BUDGETS, DOMAINS, RANKS, CaseKey, Kept, summary
from rich.console import Console

from graftory import Adapter, Hub, LoraConfig
from graftory.adapter import AdapterSpec
from graftory.compose import METHODS, merge, record_examples
from graftory.compose.merge.judging import Bench, trials_of
from graftory.compose.merge.tuning import AutoParameters, auto_merge, tune_layers
from graftory.data import load_rows, load_task
from graftory.errors import GraftoryError
from graftory.settings import TrainSettings
from graftory.training import LoadedBase, load_base, train

BASE = "wheel:minilm"
EPOCHS = 5.0
CONSOLE = Console(stderr=True)
Make = Callable[["Case"], Adapter]


@dataclass(frozen=True, slots=True)
class Case:
    """The same with the adapters."""

    key: CaseKey
    adapters: Mapping[str, Adapter]
    loaded: LoadedBase

    @property
    def rank(self) -> int | None:
        """Of the result."""
        return BUDGETS[self.key.budget]


def ours(method: str, weight: float | None = None) -> Make:
    """A row of our table; the weight None is the method's own."""

    def make(case: Case) -> Adapter:
        parts = list(case.adapters.values())
        kind: Any = METHODS[method].params
        names = kind.__dataclass_fields__
        parameters = kind(rank=case.rank) if "rank" in names else kind()
        inputs = record_examples(parts, None) if parameters.reads == "own tasks" else ()
        weights = None if weight is None else [weight] * len(parts)
        return merge(parts, method, weights=weights, parameters=parameters, inputs=inputs)

    return make


def ours_linear(case: Case) -> Adapter:
    """Task arithmetic at 0.3."""
    return ours("linear", 0.3)(case)


def ours_adamerging(case: Case) -> Adapter:
    """Tuned on 128 unlabelled training inputs of each task."""
    parts = list(case.adapters.values())
    inputs = [
        load_rows(load_task(f"wheel:{name}"), "train", limit=128, seed=case.key.seed).texts for name in case.adapters
    ]
    kind: Any = METHODS["adamerging"].params
    parameters = kind(rank=case.rank)
    found = tune_layers(case.loaded, parts, inputs, parameters, seed=case.key.seed)
    return merge(parts, "adamerging", weights=found.weights, parameters=parameters)


def ours_fisher(case: Case) -> Adapter:
    """By the gradients of 16 training rows of each task."""
    parts = list(case.adapters.values())
    kind: Any = METHODS["fisher"].params
    inputs = record_examples(parts, None, limit=16, seed=case.key.seed, gradients=True)
    return merge(parts, "fisher", parameters=kind(rank=case.rank), inputs=inputs)


def ours_auto(case: Case) -> Adapter:
    """What up to 128 rows of each task cannot tell from the best of the portfolio, or a better adapter alone."""
    return auto_merge(case.adapters, AutoParameters(rank=case.rank), seed=case.key.seed).adapter


def pefts(combination: str, weight: float | None, **options: Any) -> Make:
    """PEFT's `add_weighted_adapter`, on a model of its own with the same factors; the weight None is 1/n."""

    def make(case: Case) -> Adapter:
        parts = list(case.adapters.values())
        model, paths = peft_model(case.loaded, parts)
        each = 1 / len(parts) if weight is None else weight
        extra = {**options, **({"svd_rank": case.rank} if "svd" in combination and case.rank else {})}
        names = [str(number) for number in range(len(parts))]
        torch.manual_seed(case.key.seed)  # dare draws from the global generator
        model.base_model.add_weighted_adapter(names, [each] * len(parts), "merged", combination, **extra)
        return from_peft(model, paths, parts[0])

    return make


def peft_model(loaded: LoadedBase, parts: Sequence[Adapter]) -> tuple[Any, Sequence[str]]:
    """A copy of the base with the adapters, in PEFT."""
    configs = [lora_config(part) for part in parts]
    paths = configs[0].targets
    made = [
        peft.LoraConfig(r=config.rank, lora_alpha=int(config.alpha), target_modules=list(paths)) for config in configs
    ]
    model: Any = peft.get_peft_model(copy.deepcopy(loaded.model), made[0], "0")
    for number in range(1, len(parts)):
        model.add_adapter(str(number), made[number])
    for path in paths:
        layer = model.base_model.model.get_submodule(path)
        for number, part in enumerate(parts):
            for side, linear in (("A", layer.lora_A), ("B", layer.lora_B)):
                linear[str(number)].weight.data.copy_(part.tensors[f"{path}.lora_{side}.weight"])
    return model, paths


def from_peft(model: Any, paths: Sequence[str], like: Adapter) -> Adapter:
    """What PEFT has merged, as an adapter of ours without a head."""
    tensors, ranks, scales = {}, set(), set()
    for path in paths:
        layer = model.base_model.model.get_submodule(path)
        for side, linear in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensors[f"{path}.lora_{side}.weight"] = linear["merged"].weight.detach().clone()
        ranks.add(len(layer.lora_A["merged"].weight))
        scales.add(float(layer.scaling["merged"]))
    (rank,), (scale,) = ranks, scales
    config = LoraConfig(targets=tuple(paths), rank=rank, alpha=scale * rank, init_seed=None)
    return Adapter(AdapterSpec(like.spec.base, config), tensors)


def lora_config(adapter: Adapter) -> LoraConfig:
    """Its configuration."""
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    return config


SPARSE = {"density": 0.2}
ROWS: Mapping[str, Make] = {
    "linear mean": ours("linear"),
    "linear 0.3": ours_linear,
    "linear sum": ours("linear", 1.0),
    **{name: ours(name) for name in ("ties", "dare_ties", "della", "tsv", "iso_c", "iso_cts", "knots", "core")},
    **{name: ours(name) for name in ("ctm", "pico", "lego", "regmean")},
    "fisher": ours_fisher,
    "adamerging": ours_adamerging,
    "auto": ours_auto,
    "PEFT linear mean": pefts("linear", None),
    "PEFT linear sum": pefts("linear", 1.0),
    "PEFT cat mean": pefts("cat", None),
    "PEFT svd mean": pefts("svd", None),
    "PEFT svd sum": pefts("svd", 1.0),
    "PEFT ties sum": pefts("ties", 1.0, **SPARSE),
    "PEFT ties_svd sum": pefts("ties_svd", 1.0, **SPARSE),
    "PEFT dare_ties sum": pefts("dare_ties", 1.0, **SPARSE),
    "PEFT dare_linear mean": pefts("dare_linear", None, **SPARSE),
    "PEFT magnitude_prune mean": pefts("magnitude_prune", None, **SPARSE),
}
"""What is compared."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    group = parser.add_argument_group("accuracy")
    group.add_argument("--folder", type=Path, default=Path("graftory-merging"), help="keeps adapters and figures")
    group.add_argument("--seeds", default="0,1,2", help="seeds of training and of merging")
    group.add_argument("--tasks", default=",".join(DOMAINS), help="of which pairs and the full set are merged")
    group.add_argument("--train-rows", type=int, default=1000, help="rows that each adapter is trained on")
    group.add_argument("--test-rows", type=int, default=400, help="rows of each task that merges are measured on")
    group.add_argument("--ranks", default=",".join(RANKS), help="equal, mixed")
    group.add_argument("--budgets", default=",".join(BUDGETS), help="full, rank 16")
    group.add_argument("--only-pairs", action="store_true", help="leave the full set out")
    group.add_argument("--only-full", action="store_true", help="leave the pairs out")
    group.add_argument("--only-report", action="store_true", help="train and measure nothing: report what is there")


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Train, merge and measure what is not there yet; the summary of everything in the folder that was asked for."""
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.folder / f"accuracy-{options.train_rows}-{options.test_rows}.jsonl")
    chosen = [name for name in options.methods.split(",") if name] or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        raise SystemExit(f"no row {unknown[0]!r}; known: {', '.join(ROWS)}")
    if not options.only_report:
        everything(options, kept, chosen)
    settings = {
        "base": BASE,
        "epochs": EPOCHS,
        "train rows": options.train_rows,
        "test rows": options.test_rows,
        "seeds": options.seeds,
        **SPARSE,
    }
    return {**summary(kept, list(wanted(options)), chosen), "settings": settings}


def everything(options: argparse.Namespace, kept: Kept, chosen: Sequence[str]) -> None:
    """Measure what is missing."""
    loaded = load_base(BASE, "classification")
    for (seed, ranks), keys in groupby(wanted(options), key=lambda key: (key.seed, key.ranks)):
        adapters = trained(options, loaded, seed, ranks)
        bench = Bench(trials_of(adapters, options.test_rows, split="test"))
        cross(kept, bench, seed, ranks)
        for key in keys:
            case = Case(key, {name: adapters[name] for name in key.names}, loaded)
            for row in chosen:
                measure(kept, bench, case, row)


def wanted(options: argparse.Namespace) -> Iterator[CaseKey]:
    """All merges that were asked for."""
    names = [name for name in DOMAINS if name in options.tasks.split(",")]
    for seed in map(int, options.seeds.split(",")):
        for ranks in options.ranks.split(","):
            for subset in subsets(options, names):
                for budget in options.budgets.split(","):
                    yield CaseKey(seed, ranks, budget, subset)


def subsets(options: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All pairs, then all."""
    if not options.only_full:
        yield from combinations(names, 2)
    if not options.only_pairs and len(names) > 2:
        yield tuple(names)


def trained(options: argparse.Namespace, loaded: LoadedBase, seed: int, ranks: str) -> dict[str, Adapter]:
    """The adapters of one seed, from the hub in the folder or trained now."""
    path = options.folder / "hub"
    hub = Hub.open(path) if path.exists() else Hub.create(path)
    there = {row.name for row in hub.index()}
    found = {}
    for task_name, rank in zip(DOMAINS, RANKS[ranks], strict=True):
        if task_name not in options.tasks.split(","):
            continue
        name = f"{task_name}-r{rank}-s{seed}-n{options.train_rows}"
        if name not in there:
            CONSOLE.print(f"training {name}")
            task = load_task(f"wheel:{task_name}")
            rows = load_rows(task, "train", limit=options.train_rows, seed=seed)
            config = LoraConfig(rank=rank, alpha=2.0 * rank, init_seed=seed)
            hub.put(name, train(loaded, task, rows, config, TrainSettings(epochs=EPOCHS, seed=seed), name=name))
        found[task_name] = hub.get(name)
    return found


def cross(kept: Kept, bench: Bench, seed: int, ranks: str) -> None:
    """Every adapter, and the bare base, on every task."""
    candidates: dict[str, Adapter | None] = {"base": None, **{trial.name: trial.adapter for trial in bench.trials}}
    for name, candidate in candidates.items():
        for number, trial in enumerate(bench.trials):
            key = f"{seed}|{ranks}|alone|{name}|{trial.name}"
            if key not in kept.figures:
                kept.add(key, value=bench.judge_on(candidate, number).value)


def measure(kept: Kept, bench: Bench, case: Case, row: str) -> None:
    """One merge on the tasks in it; what refuses is kept as such."""
    key = case.key.of(row)
    if key in kept.figures:
        return
    CONSOLE.print(key)
    try:
        merged = ROWS[row](case)
    except (GraftoryError, ValueError) as error:
        kept.add(key, problem=str(error)[:200])
        return
    numbers = [n for n, trial in enumerate(bench.trials) if trial.name in case.adapters]
    values = {bench.trials[n].name: bench.judge_on(merged, n).value for n in numbers}
    rank = max(tensor.shape[0] for name, tensor in merged.tensors.items() if name.endswith("lora_A.weight"))
    told = merged.spec.lineage.parameters.get("auto")
    kept.add(key, values=values, rank=rank, **({"chosen": told["chosen"]} if isinstance(told, dict) else {}))

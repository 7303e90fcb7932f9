"""AdapterSoup on a language model: perplexity on newsgroups that no adapter was trained on.

    python benchmarks/soup_lm.py                        # resumable: --folder keeps what is done

Base: SmolLM2-135M, fp32. An adapter (LoRA, rank 8, q and v, one initialisation) is trained on each of four newsgroups:
80 posts of at most 80 tokens, 20 steps of 4. Novel groups: two others, each near one of the four. For each the
perplexity on 24 posts of: the base, every adapter, the uniform soup, and soups of those that similarity and
clustering select from a hundred unlabelled posts (encoded with All-MiniLM-L6-v2, as the paper encodes with a sentence
encoder). Three seeds draw training posts, their order and the examples; the test posts are the same. The paper's
direction: clustering < similarity < uniform < base, and the best single adapter between. It takes about 40 minutes on
one core.

The results go to benchmarks/results/soup_lm.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from graftory import Adapter, Hub, LoraConfig
from graftory.compose import merge
from graftory.compose.select import Domain, select
from graftory.data import Rows, TaskFile, load_rows, load_task
from graftory.data.task import DataSource
from graftory.errors import MergeError
from graftory.settings import SelectSettings, TrainSettings
from graftory.training import Job, LoadedBase, evaluate, load_base, train
from graftory.training.features import features_of
from graftory.versions import library_versions

BASE, ENCODER = "wheel:smollm2", "wheel:minilm"
KNOWN = ("sci.space", "rec.autos", "comp.graphics", "rec.sport.baseball")
NOVEL = ("rec.motorcycles", "comp.windows.x")
SEEDS = (0, 1, 2)
POSTS, TEST, EXAMPLES = 80, 24, 100
TASK = TaskFile(name="posts", kind="causal_lm", data=DataSource(sample="20newsgroups"), target="text", max_length=80)
SETTINGS = TrainSettings(max_steps=20, epochs=100.0, batch_size=4, learning_rate=2e-3)


def main() -> None:
    """Run what is not there yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("graftory-soup-lm"), help="keeps adapters and runs")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    options.folder.mkdir(parents=True, exist_ok=True)
    done_file = options.folder / "runs.json"
    runs: list[dict[str, Any]] = json.loads(done_file.read_text()) if done_file.exists() else []
    loaded = load_base(BASE, "causal_lm")
    posts = {split: by_group(split) for split in ("train", "test")}
    for seed in seeds:
        adapters = trained(loaded, Hub.create(options.folder / "hub"), posts["train"], seed)
        for group in NOVEL:
            if any(run["seed"] == seed and run["group"] == group for run in runs):
                continue
            found, taken = perplexities(loaded, adapters, posts, group, seed)
            runs.append({"seed": seed, "group": group, "perplexity": found, "selected": taken})
            done_file.write_text(json.dumps(runs))
    text = markdown(runs)
    Console().print(Markdown(text))
    if not options.no_write:
        results = Path(__file__).parent / "results"
        (results / "soup_lm.json").write_text(
            json.dumps({"libraries": library_versions(), "runs": runs}, indent=1) + "\n"
        )
        (results / "soup_lm.md").write_text(text)


def by_group(split: str) -> dict[str, list[str]]:
    """The posts of each newsgroup, without the lines of their headers."""
    rows = load_rows(load_task("wheel:20newsgroups"), split)
    found: dict[str, list[str]] = {}
    for post, label in zip(rows.texts, rows.targets, strict=True):
        text = " ".join(str(post).split())
        if len(text) > 200:
            found.setdefault(rows.labels[int(label)], []).append(text)
    return found


def as_rows(split: str, posts: Sequence[str], limit: int, seed: int) -> Rows:
    """Posts as what a language model writes with nothing before it."""
    return Rows(split, ("",) * len(posts), tuple(posts)).subsample(limit, seed)


def trained(loaded: LoadedBase, hub: Hub, posts: Mapping[str, Sequence[str]], seed: int) -> dict[str, Adapter]:
    """An adapter for each known newsgroup, kept in a hub."""
    known = {row.name for row in hub.index()}
    for group in KNOWN:
        name = f"{group}-{seed}"
        if name not in known:
            rows = as_rows("train", posts[group], POSTS, seed)
            config = LoraConfig(rank=8, init_seed=0)
            settings = TrainSettings(**{**_fields(SETTINGS), "seed": seed})
            hub.put(name, train(loaded, TASK, rows, config, settings, name=name))
    return {group: hub.get(f"{group}-{seed}") for group in KNOWN}


def _fields(settings: TrainSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("max_steps", "epochs", "batch_size", "learning_rate")}


def perplexities(
    loaded: LoadedBase, adapters: Mapping[str, Adapter], posts: Mapping[str, Any], group: str, seed: int
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Of everything on one novel group, and what was selected."""
    encoder = load_base(ENCODER, "classification")
    domains = [Domain(name, features_of(encoder, texts(posts["train"][name], seed))) for name in adapters]
    examples = features_of(encoder, texts(posts["train"][group], seed))
    taken = {"soup, uniform": list(adapters)}
    taken |= {f"soup, {how}": selected(domains, examples, how, seed) for how in ("similarity", "clustering")}
    candidates: dict[str, Adapter | None] = {"base": None, **{f"only {name}": one for name, one in adapters.items()}}
    candidates |= {name: merge([adapters[group] for group in groups], "soup") for name, groups in taken.items()}
    test = as_rows("test", posts["test"][group], TEST, 0)
    jobs = [Job(name, adapter, None, TASK, test) for name, adapter in candidates.items()]
    losses = {
        job.name: metrics[-1].value for job, metrics in zip(jobs, evaluate(loaded, jobs, batch_size=8), strict=True)
    }
    found = {name: math.exp(loss) for name, loss in losses.items()}
    nearest_one = taken["soup, clustering"][0]
    return {**found, "single, by clustering": found[f"only {nearest_one}"]}, taken


def selected(domains: Sequence[Domain], examples: Tensor, how: str, seed: int) -> list[str]:
    """What a selector takes; the best one where none is good enough."""
    try:
        return list(select(domains, examples, how, seed=seed).chosen)
    except MergeError:
        settings = SelectSettings(threshold=-1.0, min_share=0.0, most=1)
        return list(select(domains, examples, how, settings, seed=seed).chosen)


def texts(posts: Sequence[str], seed: int) -> tuple[Any, ...]:
    """Unlabelled examples."""
    return as_rows("train", posts, EXAMPLES, seed + 100).targets


ORDER = (
    "base",
    "single, by clustering",
    "best single (by its test)",
    "soup, uniform",
    "soup, similarity",
    "soup, clustering",
)


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    groups = sorted({run["group"] for run in runs})
    lines = ["# AdapterSoup on a language model", "", "`python benchmarks/soup_lm.py`; what is measured stands there. "]
    lines += ["Perplexity, mean ± std over seeds; lower is better.", "", f"| method | {' | '.join(groups)} |"]
    lines += [f"|---|{'--:|' * len(groups)}"]
    for method in ORDER:
        cells = []
        for group in groups:
            values = [of(run["perplexity"], method) for run in runs if run["group"] == group]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{deviation}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "Selected by clustering, by seed:", ""]
    lines += [f"- {r['group']}, seed {r['seed']}: {', '.join(r['selected']['soup, clustering'])}" for r in runs]
    return "\n".join(lines) + "\n"


def of(found: Mapping[str, float], method: str) -> float:
    """One number of a run; the best single adapter is an oracle, chosen by the test posts themselves."""
    if method in found:
        return found[method]
    return min(value for name, value in found.items() if name.startswith("only "))


if __name__ == "__main__":
    main()

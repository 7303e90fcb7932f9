"""Selecting adapters by examples and by trying, against loops over pairs and data whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftory.adapter import TASK_SOURCE, Adapter, Lineage, TaskInfo, TaskKind
from graftory.compose import merge
from graftory.compose.merge.mera import MeraParameters
from graftory.compose.select import Domain, example_texts, greedy_soup, same_track, select
from graftory.compose.select.domains import task_source
from graftory.compose.select.greedy import best_anchor
from graftory.compose.select.similarity import similarities
from graftory.compose.select.suggest import cosine, suggest
from graftory.errors import ConfigError, DataError, MergeError
from graftory.settings import SelectSettings
from tests.test_compose_merge import SITES, bottleneck, delta, lora


def cloud(centre: Sequence[float], rows: int = 60, seed: int = 0, spread: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(centre) + spread * torch.randn(rows, len(centre), generator=generator)


CENTRES = {"north": (4.0, 0, 0, 0), "east": (0, 4.0, 0, 0), "up": (0, 0, 4.0, 0), "odd": (0, 0, 0, 4.0)}
DOMAINS = [Domain(name, cloud(centre, seed=seed)) for seed, (name, centre) in enumerate(CENTRES.items())]


def test_similarity_is_the_mean_cosine_over_all_pairs() -> None:
    examples = cloud((1, 1, 0, 0), rows=7, seed=9)
    found = similarities(DOMAINS, examples)
    for domain in DOMAINS:
        pairs = [
            sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            for a in domain.features.tolist()
            for b in examples.tolist()
        ]
        assert found[domain.name] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_clustering_takes_the_domains_that_the_examples_fall_into() -> None:
    """Seven of ten rows are like `up`, two like `east`, one like `north`."""
    examples = torch.cat(
        [cloud(CENTRES["up"], 70, 10), cloud(CENTRES["east"], 20, 11), cloud(CENTRES["north"], 10, 12)]
    )
    found = select(DOMAINS, examples, "clustering")
    assert [(choice.name, round(choice.score, 6)) for choice in found.choices[:3]] == [
        ("up", 0.7),
        ("east", 0.2),
        ("north", 0.1),
    ]
    assert found.chosen == ("up", "east", "north")
    assert found.choices[3].reason == "0% of the examples in its clusters, less than 10%"
    fewer = select(DOMAINS, examples, "clustering", SelectSettings(min_share=0.15))
    assert fewer.chosen == ("up", "east")
    assert select(DOMAINS, examples, "clustering", SelectSettings(most=1)).chosen == ("up",)


def test_clustering_does_not_depend_on_the_order_of_the_adapters() -> None:
    examples = torch.cat([cloud(CENTRES["up"], 30, 10), cloud(CENTRES["east"], 30, 11)])
    assert set(select(DOMAINS, examples).chosen) == set(select(DOMAINS[::-1], examples).chosen) == {"up", "east"}


def test_similarity_takes_those_above_the_threshold_and_at_most_five() -> None:
    examples = cloud((4.0, 2.0, 0, 0), seed=20)
    found = select(DOMAINS, examples, "similarity")
    assert found.chosen == ("north", "east")
    assert [choice.chosen for choice in found.choices] == [True, True, False, False]
    many = [Domain(f"d{seed}", cloud(CENTRES["north"], seed=seed)) for seed in range(8)]
    assert len(select(many, examples, "similarity").chosen) == 5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: select(DOMAINS, cloud((-4.0, -4, -4, -4)), "similarity"), r"the nearest is \w+ \(mean cosine -"),
        (lambda: select(DOMAINS, cloud((1.0, 1, 1, 1)), "magic"), "unknown selector 'magic'"),
        (lambda: select([], cloud((1.0, 1, 1, 1))), "got none"),
        (lambda: select([DOMAINS[0], DOMAINS[0]], cloud((1.0, 1, 1, 1))), "each once"),
        (lambda: select(DOMAINS, torch.zeros(0, 4)), "no examples of the new domain"),
        (lambda: select([Domain("x", torch.zeros(0, 4))], torch.ones(1, 4)), "no examples of x"),
        (lambda: greedy_soup({}, lambda _: 0.0), "no adapters"),
    ],
)
def test_what_cannot_be_selected(call: object, text: str) -> None:
    with pytest.raises(MergeError, match=text):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("fields", [{"most": 0}, {"threshold": 2.0}, {"min_share": -0.1}, {"per_domain": 0}])
def test_impossible_settings(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        SelectSettings(**fields)  # type: ignore[arg-type]


def test_a_greedy_soup_keeps_what_does_not_make_it_worse() -> None:
    """The score is minus the distance of one number to 0; what the soup makes of it is the mean."""

    def with_value(value: float) -> Adapter:
        adapter = lora(0, init_seed=0)
        return replace(adapter, tensors={key: torch.full_like(t, value) for key, t in adapter.tensors.items()})

    def score(adapter: Adapter) -> float:
        return -abs(float(next(iter(adapter.tensors.values())).mean()))

    adapters = {"far": with_value(9.0), "plus": with_value(2.0), "minus": with_value(-1.0), "nil": with_value(0.5)}
    found = greedy_soup(adapters, score)
    # nil alone 0.5; with minus (0.5 - 1) / 2 = -0.25: better; with plus (1.5) / 3 = 0.5: worse; with far: worse
    assert [choice.name for choice in found.choices] == ["nil", "minus", "plus", "far"]
    assert found.chosen == ("nil", "minus")
    assert found.choices[2].reason == "-2.0000 alone; with it -0.5000, without -0.2500"
    assert greedy_soup(adapters, score, most=1).chosen == ("nil",)
    with pytest.raises(MergeError, match="different seeds"):
        greedy_soup({"a": lora(0, init_seed=0), "b": lora(0, init_seed=1)}, score)


def test_a_soup_of_the_same_adapter_is_it_bit_for_bit() -> None:
    task = TaskInfo("t", "classification", labels=("a", "b"), head=("classifier",))
    adapter = lora(3, init_seed=0, task=task, head={"classifier.weight": torch.randn(2, 5)})
    for n in (1, 2, 3, 5, 8):
        merged = merge([adapter] * n, "soup")
        assert set(merged.tensors) == set(adapter.tensors)
        assert all(torch.equal(value, adapter.tensors[key]) for key, value in merged.tensors.items())


def test_examples_come_from_lines_or_from_a_task(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    path.write_text("one\n\n  two \nthree\n")
    assert example_texts(str(path), 10) == ("one", "two", "three")
    assert set(example_texts(str(path), 2, seed=1)) < {"one", "two", "three"}
    path.write_text("\n")
    with pytest.raises(DataError, match="no examples in it"):
        example_texts(str(path), 10)
    with pytest.raises(DataError, match="cannot be read"):
        example_texts(str(tmp_path / "gone.txt"), 10)
    (tmp_path / "rows.csv").write_text("text,label\nred,a\nblue,b\n")
    task = tmp_path / "task.yaml"
    task.write_text(f"name: colours\nkind: classification\ndata: {{train: {tmp_path / 'rows.csv'}}}\nlabel: label\n")
    assert example_texts(str(task), 10) == ("red", "blue")


def test_an_adapter_whose_record_names_no_task_is_named() -> None:
    adapter = lora(0)
    with pytest.raises(ConfigError, match="theirs: its record does not name the task"):
        task_source("theirs", adapter)
    lineage = Lineage(parameters={TASK_SOURCE: "wheel:trec"})
    assert task_source("x", replace(adapter, spec=replace(adapter.spec, lineage=lineage))) == "wheel:trec"


def test_the_cosine_of_two_updates_is_that_of_their_matrices() -> None:
    left, right = lora(1), lora(2, rank=5, alpha=3.0)
    one, other = (torch.cat([delta(adapter, path).flatten() for path in SITES]) for adapter in (left, right))
    assert cosine(left, right) == pytest.approx(float(one @ other / (one.norm() * other.norm())), abs=1e-9)
    assert cosine(left, left) == pytest.approx(1)
    assert cosine(left, bottleneck(0)) is None
    assert cosine(left, replace(left, tensors={key: 0 * value for key, value in left.tensors.items()})) is None


def test_of_two_adapters_with_one_update_one_is_suggested() -> None:
    adapters = {"a": lora(1), "twin": lora(1), "other": lora(2)}
    domains = [Domain(name, cloud(CENTRES["up"], seed=seed)) for seed, name in enumerate(adapters)]
    found = {item.name: item for item in suggest(adapters, domains, cloud(CENTRES["up"], seed=9))}
    assert found["other"].suggested
    assert sorted(found[name].suggested for name in ("a", "twin")) == [False, True]
    assert any("its update is nearly that of" in reason for name in ("a", "twin") for reason in found[name].reasons)
    assert found["a"].nearest == "twin"
    assert found["a"].weights == pytest.approx(1)


def test_the_track_is_that_of_the_labels() -> None:
    def of(kind: TaskKind, *labels: str) -> TaskInfo:
        return TaskInfo("t", kind, labels=labels)

    adapters = {
        "same": lora(1, task=of("classification", "bad", "good")),
        "turned": lora(2, task=of("classification", "good", "bad")),
        "other": lora(3, task=of("classification", "spam", "ham")),
        "number": lora(4, task=of("regression")),
        "unknown": lora(5),
    }
    found = same_track(adapters, of("classification", "bad", "good"))
    assert found.chosen == ("same", "turned")
    assert {choice.name: choice.reason for choice in found.choices}["unknown"] == "no task is recorded"
    with pytest.raises(MergeError, match="no adapter was trained for causal_lm"):
        same_track(adapters, of("causal_lm"))


def test_the_best_anchor_is_the_one_whose_merge_scores_best() -> None:
    adapters = [lora(1), lora(2), lora(3)]
    wanted = merge(adapters, "mera", parameters=MeraParameters(anchor=2)).tensors

    def score(adapter: Adapter) -> float:
        return -sum(float((adapter.tensors[key] - value).norm()) for key, value in wanted.items())

    parameters, scores = best_anchor(adapters, score, MeraParameters(anchor=0, cost_of="all"))
    assert parameters == MeraParameters(anchor=scores.index(max(scores)) + 1, cost_of="all")
    parameters, scores = best_anchor(adapters, score, MeraParameters(anchor=0))
    assert parameters.anchor == 2
    assert scores[1] == 0
    with pytest.raises(MergeError, match="best_anchor tries all"):
        merge(adapters, "mera", parameters=MeraParameters(anchor=0))

"""The bounds, what a strategy can and cannot do, shared heads, prompts, and what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from graftory.adapter import Adapter, AdapterSpec, BaseModel, TaskInfo
from graftory.config import LoraConfig
from graftory.continual import STRATEGIES, Limits, load_sequence, run_sequence
from graftory.continual.capability import check_capability, check_labels
from graftory.continual.kept_file import load_kept, save_kept
from graftory.continual.strategies import PLUGINS, Kept, strategy_of
from graftory.continual.strategies.seq import Sequential
from graftory.errors import ConfigError, CorruptAdapterError
from graftory.hub import Hub
from graftory.settings import TrainSettings
from graftory.training import Company, Hooks, OtherTask, train_in_company
from graftory.training.company import head_of
from graftory.training.losses import mixed_losses
from tests.continual_samples import SHORT, Run, make_place, sequence_file, short_run
from tests.training_samples import tiny_base, tiny_rows, tiny_task

CONFIG, SETTINGS = LoraConfig(rank=2), TrainSettings(max_steps=4, batch_size=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("place"))
    # the same labels, the other way round: what is right for one is wrong for the other
    for split in ("train", "test"):
        rows = (root / f"colours-{split}.csv").read_text().splitlines()
        turned = [row.replace(",warm", ",x").replace(",cold", ",warm").replace(",x", ",cold") for row in rows]
        (root / f"turned-{split}.csv").write_text("\n".join(turned) + "\n")
    text = (root / "colours.yaml").read_text().replace("colours", "turned")
    (root / "turned.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def run_of(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    def run(strategy: str, *tasks: str, **changes: Any) -> Run:
        return short_run(place, tmp_path_factory.mktemp("run"), strategy, tasks or ("colours", "animals"), **changes)

    return run


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_single_and_frozen_forget_exactly_nothing(run_of: Callable[..., Run]) -> None:
    reports = {}
    for strategy in ("single", "frozen"):
        report, versions, _ = run_of(strategy)
        assert report.summary.bwt == report.summary.forgetting == 0.0
        assert report.routing is None
        reports[strategy] = (report, versions)
    frozen, versions = reports["frozen"]
    assert set(frozen.storage[-1]) == {"heads"}
    for version in versions:
        assert all(float(b.abs().max()) == 0 for key, b in version.body_tensors().items() if "lora_B" in key)
    assert not torch.equal(
        versions[0].tensors["classifier.weight"], reports["single"][1][0].tensors["classifier.weight"]
    )


def test_joint_learns_all_heads_from_mixed_batches(run_of: Callable[..., Run]) -> None:
    report, versions, folder = run_of("joint", train={**SHORT, "max_steps": 60})
    assert min(report.matrix[1]) > 0.85
    kept = folder.kept(folder.commits()[1]).tensors
    assert set(kept) == {"heads/colours/classifier.weight", "heads/colours/classifier.bias"}
    assert not torch.equal(kept["heads/colours/classifier.weight"], versions[0].tensors["classifier.weight"])
    # the body starts afresh: step 2 does not go on from step 1
    assert versions[1].spec.lineage.parents[0].relation == "continued"


STILL = {"max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "batch_size": 8, "head_start": "probe"}


@pytest.mark.parametrize("strategy", ["isolated", "seq", "frozen", "o-lora", "sd-lora", "gated", "joint", "replay"])
def test_every_fresh_head_starts_at_its_probe(run_of: Callable[..., Run], strategy: str) -> None:
    """Nothing else learns here: without the probe, what a random head answers is right by chance."""
    report, *_ = run_of(strategy, train=STILL)
    assert min(report.matrix[1]) > 0.85
    chance, *_ = run_of(strategy, train={**STILL, "head_start": "random"})
    assert max(chance.matrix[1]) < 0.75


def test_a_shared_head_starts_once(run_of: Callable[..., Run]) -> None:
    _, versions, _ = run_of("seq", "colours", "turned", train=STILL, scenario="domain")
    first, second = (version.tensors["classifier.weight"] for version in versions)
    assert torch.allclose(first, second)
    # of both tasks' rows, which contradict each other, nothing can be learnt
    report, *_ = run_of("joint", "colours", "turned", train=STILL, scenario="domain")
    assert report.matrix[0][0] > 0.85
    assert sum(report.matrix[1]) < 1.2


def test_losses_of_mixed_kinds_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.5, float("-inf")], [3.0, 1.0]], requires_grad=True)
    labels = torch.tensor([1.0, 2.0, 0.0])
    losses = mixed_losses(["classification", "regression", "classification"], logits, labels)
    entropy = functional.cross_entropy(logits[[0, 2]], torch.tensor([1, 0]), reduction="none")
    expected = torch.stack([entropy[0], (logits[1, 0] - 2) ** 2, entropy[1]])
    assert torch.allclose(losses.total, expected)
    assert losses.count.tolist() == [1, 1, 1]


def test_a_head_learns_from_its_own_rows_alone(tmp_path: Path) -> None:
    """A head that comes along without rows stays; one whose rows are mixed in learns."""
    loaded = tiny_base("classification", tmp_path / "base")
    task, rows = tiny_task("classification"), tiny_rows("classification")
    still = replace(SETTINGS, weight_decay=0.0)
    alone = train_in_company(loaded, task, rows, CONFIG, still, name="a")
    head = head_of(alone.adapter)
    company = Company(heads={"with": head, "without": head}, others=(OtherTask(task, rows, "with"),))
    learnt = train_in_company(loaded, task, rows, CONFIG, still, name="a", company=company)
    assert torch.equal(learnt.heads["without"].tensors["classifier.weight"], head.tensors["classifier.weight"])
    assert not torch.equal(learnt.heads["with"].tensors["classifier.weight"], head.tensors["classifier.weight"])


def test_company_that_changes_is_found(tmp_path: Path) -> None:
    loaded = tiny_base("classification", tmp_path / "base")
    task, rows = tiny_task("classification"), tiny_rows("classification")
    old = train_in_company(loaded, task, rows, CONFIG, SETTINGS, name="a").adapter

    def meddle(adapted: Any, step: int) -> None:
        with torch.no_grad():
            next(iter(adapted.weights("old").values())).add_(step)

    company = Company({"old": old})
    with pytest.raises(CorruptAdapterError, match="old changed"):
        train_in_company(
            loaded, task, rows, CONFIG, SETTINGS, name="a", company=company, hooks=Hooks(on_gradients=(meddle,))
        )
    train_in_company(loaded, task, rows, CONFIG, SETTINGS, name="a", company=company)


# --- scenarios -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["seq", "o-lora", "replay"])
def test_in_the_domain_scenario_one_head_answers_all(run_of: Callable[..., Run], strategy: str) -> None:
    report, (first, second), _ = run_of(strategy, "colours", "turned", scenario="domain", limits=Limits(train=48))
    # both tasks have the same inputs with opposite labels, and no row says of which it is: together they make 1
    assert sum(report.matrix[1]) == pytest.approx(1.0)
    assert sum(report.matrix[0]) == pytest.approx(1.0)
    assert not torch.equal(first.tensors["classifier.weight"], second.tensors["classifier.weight"])


def test_the_labels_must_fit_the_scenario(run_of: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="scenario 'domain': 'animals' has kind classification with labels bird"):
        run_of("seq", scenario="domain")
    with pytest.raises(ConfigError, match="scenario 'class': 'turned': label 'cold' is in 'colours' too"):
        run_of("isolated", "colours", "turned", scenario="class")
    check_labels("class", [adapter.spec.task for adapter in _two() if adapter.spec.task])


def _two() -> list[Adapter]:
    tasks = [TaskInfo("a", "classification", ("x", "y")), TaskInfo("b", "classification", ("z",))]
    return [Adapter(AdapterSpec(BaseModel("b"), CONFIG, task), {}) for task in tasks]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "seq", "scenario": "class"}, "cannot do scenario 'class'.*those that can: isolated"),
        ({"strategy": "single", "scenario": "domain"}, "cannot do scenario 'domain'"),
        ({"strategy": "replay", "store_data": False}, "keeps rows of earlier tasks.*those that can: seq, isolated"),
        ({"strategy": "ewc+a-gem", "store_data": False}, "keeps rows"),
        (
            {"strategy": "sd-lora", "method": "bottleneck", "options": {}},
            "does not work on bottleneck adapters, only on lora",
        ),
        ({"strategy": "migu+ewc", "method": "bottleneck", "options": {}}, "does not work on bottleneck"),
        ({"strategy": "progressive-prompts"}, "does not work on lora adapters, only on smop"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused_before_anything_runs(
    place: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    sequence = replace(load_sequence(sequence_file(place, "isolated", ["colours", "animals"])), **changes)
    with pytest.raises(ConfigError, match=reason):
        run_sequence(sequence, Hub.create(tmp_path / "hub"), tmp_path / "run")
    assert not (tmp_path / "run" / "sequence.json").exists()


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("ewc", {"strength": -1}, "strength: got -1.0, wanted 0 or more"),
        ("ewc", {"lambda": 1}, "unknown key 'lambda'; it takes strength, decay, fisher_rows"),
        ("ewc+migu", {"strength": 1}, "got 'strength' for strategy ewc\\+migu, wanted a mapping for each of ewc, migu"),
        ("seq", {"strength": 1}, "wanted none"),
        ("isolated", {"a": 1}, "it takes none"),
        ("seq+hope", {}, "unknown strategy 'seq\\+hope'"),
        ("ewc+ewc", {}, "each once"),
        ("inflora", {"energy": 0}, "energy: got 0.0, wanted more than 0"),
    ],
)
def test_parameters_are_read_strictly(name: str, parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        strategy_of(name, parameters)


def test_plugins_combine() -> None:
    both = strategy_of("ewc+migu", {"ewc": {"strength": 3.0}, "migu": {"share": 0.5}})
    assert isinstance(both, Sequential)
    assert [type(plugin) for plugin in both.plugins] == [PLUGINS["ewc"], PLUGINS["migu"]]
    assert both == strategy_of("seq+ewc+migu", {"ewc": {"strength": 3.0}, "migu": {"share": 0.5}})
    assert both.needs.methods == ("lora",)
    assert strategy_of("ewc+replay").needs.stored_data


def test_every_strategy_says_what_it_is_and_is_documented(place: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "continual.md").read_text()
    sequence = load_sequence(sequence_file(place, "isolated", ["colours"]))
    for name in (*STRATEGIES, *PLUGINS):
        strategy = strategy_of(name)
        assert strategy.title
        assert strategy.stores
        assert f"| `{name}` |" in text
        for scenario in strategy.needs.scenarios:
            method = strategy.needs.methods[0]
            asked = replace(sequence, strategy=name, scenario=scenario, method=method, options={})
            check_capability(asked, strategy.needs)


# --- prompts, and what is kept ---------------------------------------------------------------------------------------


def test_progressive_prompts_stay_behind_the_new_one(run_of: Callable[..., Run]) -> None:
    options = {"prompts": 1, "length": 2}
    report, (first, second), _ = run_of("progressive-prompts", method="smop", options=options)
    [(key, old)], [(_, both)] = first.body_tensors().items(), second.body_tensors().items()
    assert old.shape[:2] == (1, 2)
    assert both.shape[:2] == (1, 4)
    assert torch.equal(both[:, 2:], old)
    assert not torch.equal(both[:, :2], old)
    assert key.endswith("smop_prompts")
    assert report.summary.bwt == 0.0
    assert report.routing is not None


def test_what_is_kept_is_read_back_or_refused(tmp_path: Path) -> None:
    kept = Kept({"a/x": torch.arange(6.0).view(2, 3)}, {"a/rows": ["é", 1, 2.5]})
    path = tmp_path / "kept.safetensors"
    digest = save_kept(kept, path)
    again = load_kept(path, digest)
    assert again.values == kept.values
    assert torch.equal(again.tensors["a/x"], kept.tensors["a/x"])
    assert again.under("a").moved("a").values == kept.values
    assert save_kept(kept, path) == digest
    assert save_kept(Kept(), tmp_path / "none") == ""
    assert load_kept(tmp_path / "none", "") == Kept()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptAdapterError, match="not what was kept"):
        load_kept(path, digest)


def test_the_ledger_counts_what_is_needed_to_answer(run_of: Callable[..., Run]) -> None:
    """LoRA of rank 8 on six linears of 32, 48 and 32: 8 (5 · 64 + ...) numbers; heads of 2 and of 3 classes."""
    report, versions, folder = run_of("isolated")
    body = sum(tensor.nbytes for tensor in versions[0].body_tensors().values())
    heads = [4 * classes * (32 + 1) for classes in (2, 3)]
    assert [step["adapters"] for step in report.storage] == [body, 2 * body]
    assert [step["heads"] for step in report.storage] == [heads[0], sum(heads)]
    assert report.storage[-1]["router"] == folder.router.stat().st_size
    seq = run_of("ewc")[0]
    assert [step["adapters"] for step in seq.storage] == [step["ewc"] for step in seq.storage] == [body, body]

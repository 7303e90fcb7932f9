"""Fisher merging against gradients that autograd takes of whole weights, and as a command on a tiny base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn import functional

from graftory.adapter import TASK_SOURCE, Adapter, Lineage, TaskInfo
from graftory.adapters import base_of, new_adapter
from graftory.adapters.architectures import module_at
from graftory.cli import cli
from graftory.compose import export, merge, merge_again, merge_without, record_gradients
from graftory.compose.merge import dense
from graftory.compose.merge.fisher import FisherParameters
from graftory.config import BitfitConfig, DoraConfig, Ia3Config, LoraConfig
from graftory.errors import MergeError
from graftory.hub import Hub
from graftory.training import LoadedBase, load_base
from tests.merge_oracles import best_of_rank, deltas, regauged
from tests.test_compose_kinds import MODELS, of_kind, weights_of
from tests.test_compose_merge import SITES, WIDTHS, delta, lora, relative
from tests.training_samples import save_base

THREE = (lora(1), lora(2, rank=4), lora(3, rank=2, targets=SITES[:1]))
EXAMPLES = 7


def read(adapters: tuple[Adapter, ...]) -> list[dict[str, Tensor]]:
    """Inputs and gradients of examples of one to three tokens, other ones for each adapter."""
    found = []
    for seed, adapter in enumerate(adapters):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(EXAMPLES).repeat_interleave(torch.randint(1, 4, (EXAMPLES,), generator=generator))
        one: dict[str, Tensor] = {}
        for path in adapter.spec.config.targets:
            d_out, d_in = WIDTHS[path]
            one[path] = torch.randn(len(rows), d_in, generator=generator)
            one[f"{path}.gradients"] = torch.randn(len(rows), d_out, generator=generator) * (1 + seed)
            one[f"{path}.rows"] = rows
        found.append(one)
    return found


def fisher_of(record: dict[str, Tensor], path: str) -> Tensor:
    """The mean over examples of the squared sum of g xᵀ, an example at a time."""
    x, g, rows = record[path].double(), record[f"{path}.gradients"].double(), record[f"{path}.rows"]
    return torch.stack([(g[rows == one].T @ x[rows == one]).square() for one in range(EXAMPLES)]).mean(0)


def wanted_at(
    adapters: tuple[Adapter, ...], records: list[dict[str, Tensor]], weights: list[float], path: str
) -> Tensor:
    here = [number for number, one in enumerate(adapters) if path in one.spec.config.targets]
    shares = [weights[number] * fisher_of(records[number], path) for number in here]
    above = torch.stack([share * one for share, one in zip(shares, deltas(adapters, path), strict=True)]).sum(0)
    return above / torch.stack(shares).sum(0)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25]])
@pytest.mark.parametrize("block", [150, 1 << 22])
def test_it_is_the_mean_by_fisher_information(
    weights: list[float], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "BLOCK", block)
    records = read(THREE)
    merged = merge(THREE, "fisher", weights=weights, inputs=records)
    for path in SITES:
        assert relative(delta(merged, path), wanted_at(THREE, records, weights, path)) < 1e-5


def test_rank_scaling_and_how_an_update_is_written_down() -> None:
    records = read(THREE)
    merged = merge(THREE, "fisher", inputs=records)
    other = merge([regauged(adapter) for adapter in THREE], "fisher", inputs=records)
    short = merge(THREE, "fisher", inputs=records, parameters=FisherParameters(rank=2, scaling=-2.0))
    by_module = merge(THREE, "fisher", inputs=records, weights={SITES[2]: [1.0, 3.0, 1.0]})
    for path in SITES:
        assert relative(delta(other, path), delta(merged, path)) < 1e-4
        assert relative(delta(short, path), -2 * best_of_rank(delta(merged, path), 2)) < 1e-5
    assert relative(delta(by_module, SITES[2]), wanted_at(THREE, records, [1.0, 3.0, 1.0], SITES[2])) < 1e-5
    assert relative(delta(by_module, SITES[0]), delta(merged, SITES[0])) < 1e-6


def test_one_adapter_is_itself_and_the_same_fisher_information_gives_the_mean() -> None:
    records = read(THREE)
    alone = merge(THREE[:1], "fisher", inputs=records[:1])
    even = merge(THREE[:2], "fisher", inputs=[records[0]] * 2, weights=[1.0, 3.0])
    silent = [{key: tensor * (not key.endswith("gradients")) for key, tensor in one.items()} for one in records[:2]]
    nothing = merge(THREE[:2], "fisher", inputs=silent, weights=[1.0, 3.0])
    for path in SITES:
        one, two = deltas(THREE[:2], path)
        assert relative(delta(alone, path), one) < 1e-6
        assert relative(delta(even, path), (one + 3 * two) / 4) < 1e-5
        assert relative(delta(nothing, path), (one + 3 * two) / 4) < 1e-5


class Words:
    """Stands for a tokenizer: texts are numbers already."""

    pad_token_id = 0
    eos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


TEXTS = ("3 5 7 9", "4 6", "8 2 2 11 12", "19 3 3")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", [LoraConfig, Ia3Config])
def test_what_is_recorded_makes_autograds_gradients_by_whole_weights(name: str, kind: Any) -> None:
    """Two batches with padding, against one example at a time, on the folded model, with the same answers drawn."""
    model = MODELS[name]()
    adapter = of_kind(model, kind)
    task: Any = TaskInfo("t", "classification" if name == "bert" else "causal_lm", ("a", "b") if name == "bert" else ())
    adapter = replace(adapter, spec=replace(adapter.spec, task=replace(task, max_length=16)))
    if name == "bert":
        heads = {key: model.state_dict()[key] for key in ("classifier.weight", "classifier.bias")}
        info = replace(adapter.spec.task, head=("classifier",))  # type: ignore[type-var]
        adapter = replace(adapter, spec=replace(adapter.spec, task=info), tensors={**adapter.tensors, **heads})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = record_gradients(LoadedBase(model, Words(), base_of(model)), adapter, TEXTS, seed=3, batch_size=2)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    plain = export(model, adapter).eval()
    plain.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    rows: dict[str, list[Tensor]] = {}
    for text in TEXTS:
        ids = torch.tensor([[int(word) for word in text.split()]])
        logits = plain(input_ids=ids).logits
        flat = logits if name == "bert" else logits[0]
        drawn = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
        plain.zero_grad()
        functional.cross_entropy(flat, drawn, reduction="sum").backward()
        for path in adapter.spec.config.targets:
            gradient = module_at(plain, path)[1].weight.grad
            assert isinstance(gradient, Tensor)
            rows.setdefault(path, []).append(gradient.T if name == "gpt2" else gradient)
    for path, gradients in rows.items():
        x, g, row = found[path], found[f"{path}.gradients"], found[f"{path}.rows"]
        for number, wanted in enumerate(gradients):
            assert relative(g[row == number].T @ x[row == number], wanted) < 1e-4


def test_biases_have_their_own() -> None:
    model = MODELS["bert"]()
    adapters = [of_kind(model, BitfitConfig, seed) for seed in (1, 2)]
    loaded = LoadedBase(model, Words(), base_of(model))
    records = [record_gradients(loaded, one, TEXTS, seed=seed) for seed, one in enumerate(adapters)]
    merged = merge(adapters, "fisher", inputs=records)
    assert isinstance(merged.spec.config, BitfitConfig)
    # a key's bias shifts all logits of a softmax alike: its gradient is rounding, and no prediction depends on it
    for path in (path for path in merged.spec.config.targets if not path.endswith("key")):
        fishers = []
        for record in records:
            g, rows = record[f"{path}.gradients"].double(), record[f"{path}.rows"]
            fishers.append(torch.stack([g[rows == one].sum(0).square() for one in range(len(TEXTS))]).mean(0))
        one, two = (adapter.tensors[f"{path}.bias_delta"].double() for adapter in adapters)
        whole = fishers[0] + fishers[1]
        plain = torch.where(whole > 0, (fishers[0] * one + fishers[1] * two) / whole, (one + two) / 2)
        assert relative(merged.tensors[f"{path}.bias_delta"].double(), plain) < 1e-5


def test_unlike_kinds_are_weighed_entry_by_entry() -> None:
    model = MODELS["bert"]()
    adapters = [of_kind(model, kind, seed) for seed, kind in enumerate((LoraConfig, Ia3Config))]
    loaded = LoadedBase(model, Words(), base_of(model))
    records = [record_gradients(loaded, one, TEXTS) for one in adapters]
    got = weights_of(model, merge(adapters, "fisher", inputs=records, base=model))
    each = [weights_of(model, one) for one in adapters]
    path = adapters[0].spec.config.targets[0]
    fishers = []
    for record in records:
        x, g, rows = record[path].double(), record[f"{path}.gradients"].double(), record[f"{path}.rows"]
        fishers.append(torch.stack([(g[rows == one].T @ x[rows == one]).square() for one in range(4)]).mean(0))
    one, two = (changes[f"{path}.weight"] for changes in each)
    assert relative(got[f"{path}.weight"], (fishers[0] * one + fishers[1] * two) / (fishers[0] + fishers[1])) < 1e-4


def test_what_is_missing_is_said() -> None:
    with pytest.raises(MergeError, match=r"fisher: needs the gradients of adapter 1 at layer\.0\.query; hub merge"):
        merge(THREE, "fisher")
    with pytest.raises(MergeError, match="got the weight -1 of adapter 2, wanted none below 0"):
        merge(THREE, "fisher", weights=[1.0, -1.0, 1.0], inputs=read(THREE))
    records = read(THREE)
    records[1][SITES[0]] = records[1][SITES[0]][:, :3]
    with pytest.raises(MergeError, match=r"gradients of \(12, 3\) for a module of \(12, 10\)"):
        merge(THREE, "fisher", inputs=records)


def moved(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every tensor a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    return {key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A hub with three adapters of a tiny BERT, whose records name a task of its own words each."""
    base = save_base("bert", tmp_path / "base")
    loaded = load_base(str(base), "classification")
    hub = Hub.create(tmp_path / "hub")
    for number, name in enumerate(("low", "middle", "high")):
        words = [f"w{10 * number + digit}" for digit in range(10)]
        rows = [f"{' '.join(words[row % 5 : row % 5 + 5])},{'even' if row % 2 else 'odd'}" for row in range(8)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        files = f"{{train: {name}.csv, test: {name}.csv}}"
        source = tmp_path / f"{name}.yaml"
        source.write_text(f"name: {name}\nkind: classification\ndata: {files}\nlabel: label\n")
        task = TaskInfo(name, "classification", ("even", "odd"))
        for kind in (LoraConfig, DoraConfig) if name == "low" else (LoraConfig,):
            fresh = new_adapter(loaded.model, kind(rank=2), task=task, base=loaded.base)
            lineage = Lineage("train", parameters={TASK_SOURCE: str(source)})
            spec = replace(fresh.spec, lineage=lineage)
            hub.put(name if kind is LoraConfig else f"{name}-dora", Adapter(spec, moved(fresh.tensors, number)))
    return tmp_path


def run(home: Path, *arguments: object) -> str:
    result = CliRunner().invoke(cli, ["--registry", str(home / "hub"), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_reads_each_adapters_own_task_and_the_ledger_again(home: Path) -> None:
    hub = Hub.open(home / "hub")
    run(home, "merge", "low", "middle", "high", "--method", "fisher", "--rank", "4", "--name", "by-fisher")
    assert hub.record("by-fisher").spec.lineage.parameters["seed"] == 0
    assert merge_again(hub, "by-fisher").same
    run(home, "merge", "low", "high", "--method", "fisher", "--rank", "4", "--name", "fisher-never")
    left = hub.record(hub.put("fisher-left", merge_without(hub, "by-fisher", ["middle"])))
    assert left.digest == hub.record("fisher-never").digest
    mean = merge([hub.get(name) for name in ("low", "high")], weights=[0.5, 0.5])
    path = mean.spec.config.targets[0]
    assert relative(delta(hub.get("fisher-never"), path), delta(mean, path)) > 1e-3


def test_the_command_loads_the_base_for_what_scales_its_weights(home: Path) -> None:
    """DoRA and LoRA in one call: the logits of the merge are those of both folded in, and the record makes it again."""
    hub = Hub.open(home / "hub")
    answer = json.loads(run(home, "merge", "low-dora", "high", "--weights", "1,-0.5", "--name", "both", "--json"))
    assert answer["ref"] == "both@1"
    assert "bit for bit" in run(home, "merge", "both", "--again")
    model = load_base(str(home / "base"), "classification").model
    one, two, both = (weights_of(model, hub.get(name)) for name in ("low-dora", "high", "both"))
    run(home, "merge", "both", "--without", "high", "--name", "alone")
    alone = weights_of(model, hub.get("alone"))
    for key in (key for key in both if not key.startswith("classifier")):
        assert float((both[key] - one[key] + 0.5 * two[key]).abs().max()) < 1e-5
        assert float((alone[key] - one[key]).abs().max()) < 1e-5

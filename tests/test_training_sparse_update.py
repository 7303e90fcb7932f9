"""Diff pruning and SPT: gates, masks, sensitivities and the split, each against its formula; trainings of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory import AdapterConfig, attach, new_adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.architectures import linear_widths
from graftory.adapters.targets import linear_targets
from graftory.config import DiffConfig, SparseUpdateConfig, SptConfig
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.settings import TrainSettings
from graftory.training import LoadedBase, train
from graftory.training.company import encoded
from graftory.training.encode import Collator
from graftory.training.recipes import Scene, recipe_of
from graftory.training.recipes.diff import Gates, largest
from graftory.training.recipes.gates import HardConcrete
from graftory.training.recipes.spt import sensitivities, split
from tests.adapter_samples import task
from tests.conftest import tiny_batch, tiny_model
from tests.training_samples import tiny_base, tiny_rows, tiny_task

QUICK = TrainSettings(epochs=2, batch_size=8, learning_rate=1e-2, save_steps=3)
TARGETS = ("layer.1.output.dense", "layer.1.attention.self.value")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


@pytest.fixture
def scene(loaded: LoadedBase) -> Iterator[Any]:
    """Makes a scene for a configuration; the model is bare again afterwards."""
    made: list[AdaptedModel] = []

    def build(config: AdapterConfig) -> Scene:
        info, rows = tiny_task("classification"), tiny_rows("classification")
        adapted = AdaptedModel(loaded.model, loaded.base)
        made.append(adapted)
        adapted.add("it", new_adapter(loaded.model, config, task=rows.info(info), base=loaded.base))
        adapted.train_only("it")
        return Scene(adapted, "it", "classification", encoded(loaded, info, rows), 0, QUICK)

    yield build
    for adapted in made:
        adapted.detach()


def expectation(log_alpha: Tensor, low: float, high: float) -> Tensor:
    """E z = ∫ z du for β = 1: σ(logit u + log α) is a u / (1 + (a − 1) u), which has a known integral."""
    a, width = log_alpha.exp(), high - low

    def reached(s: float) -> Tensor:
        """The u where σ(logit u + log α) is s."""
        return s / (s + a * (1 - s))

    def integral(u: Tensor) -> Tensor:
        return low * u + width * a * (u / (a - 1) - torch.log1p((a - 1) * u) / (a - 1) ** 2)

    first, last = reached(-low / width), reached((1 - low) / width)
    return integral(last) - integral(first) + (1 - last)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 1.1), (-1.5, 1.5)])
def test_gates_have_the_mean_and_gradient_of_their_closed_form(low: float, high: float) -> None:
    gates, u = HardConcrete(1.0, low, high), ((torch.arange(200_000) + 0.5) / 200_000).double()
    for start in (-2.0, 0.5, 3.0):
        drawn, exact = (torch.tensor(start, dtype=torch.double, requires_grad=True) for _ in range(2))
        mean, wanted = gates.at(drawn, u).mean(), expectation(exact, low, high)
        torch.testing.assert_close(mean, wanted, atol=2e-4, rtol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, at)[0] for value, at in ((mean, drawn), (wanted, exact))), atol=2e-4, rtol=0
        )


@pytest.mark.parametrize("temperature", [2 / 3, 1.0])
def test_the_chance_of_a_gate_is_the_share_of_u_that_open_it(temperature: float) -> None:
    gates, u = HardConcrete(temperature, -0.1, 1.1), ((torch.arange(100_000) + 0.5) / 100_000).double()
    for start in (-1.0, 0.7, 2.0):
        log_alpha = torch.tensor(start, dtype=torch.double)
        share = (gates.at(log_alpha, u) > 0).double().mean()
        torch.testing.assert_close(gates.chance(log_alpha), share, atol=2e-4, rtol=0)
        assert float(gates.usual(log_alpha)) == pytest.approx(min(1.0, max(0.0, 1.2 / (1 + math.exp(-start)) - 0.1)))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_penalty_counts_the_weights_that_change(grouped: bool) -> None:
    """Against draws: a weight changes where its gate and that of its matrix are open."""
    config = DiffConfig(grouped=grouped, stretch_low=-0.1, stretch_high=1.1)
    starts = {"a/gate": [-1.0, 2.0, 0.0], "b/gate": [0.5, -3.0]}
    starts |= {"a/group/gate": [0.4], "b/group/gate": [-0.7]} if grouped else {}
    held = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name, start in starts.items()})
    gates = Gates(config, ("a", "b"), held)
    torch.manual_seed(0)
    ones = {"a.sparse_value": torch.ones(20_000, 3), "b.sparse_value": torch.ones(20_000, 2)}
    wide = nn.ParameterDict({name: nn.Parameter(value.detach().expand(20_000, -1)) for name, value in held.items()})
    drawn = Gates(config, ("a", "b"), wide).gated(ones)
    counts = torch.cat(list(drawn.values()), 1).count_nonzero(1).float()
    expected = gates.expected()
    assert float(expected.detach()) == pytest.approx(float(counts.mean()), abs=0.04)
    expected.backward()
    for name, value in held.items():
        up, down = ({other: nn.Parameter(each.detach().clone()) for other, each in held.items()} for _ in range(2))
        with torch.no_grad():
            up[name][0] += 0.01
            down[name][0] -= 0.01
        slope = (
            Gates(config, ("a", "b"), nn.ParameterDict(up)).expected()
            - Gates(config, ("a", "b"), nn.ParameterDict(down)).expected()
        ) / 0.02
        assert value.grad is not None
        torch.testing.assert_close(value.grad[0], slope.detach(), atol=1e-4, rtol=1e-3)


def test_the_largest_of_all_vectors_are_kept_exactly_so_many() -> None:
    deltas = [torch.tensor([0.1, -5.0, 0.0, 2.0]), torch.tensor([3.0, -0.2])]
    assert [mask.tolist() for mask in largest(deltas, 0.5)] == [[False, True, False, True], [True, False]]
    assert sum(int(mask.sum()) for mask in largest([torch.zeros(7), torch.ones(3)], 0.65)) == 6
    assert sum(int(mask.sum()) for mask in largest(deltas, 1e-6)) == 1


def test_diff_draws_its_gates_and_then_no_more(scene: Any) -> None:
    """z ⊙ w with a product of gates, worked out from the same u; once settled, nothing is drawn and little is open."""
    config = DiffConfig(targets=TARGETS, keep=0.01, gate_start=1.0)
    made = scene(config)
    recipe = recipe_of(made)
    live = made.model.weights("it")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in live.values():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    assert recipe.stand_ins is not None
    torch.manual_seed(7)
    drawn = recipe.stand_ins(live)
    torch.manual_seed(7)
    for key, weight in live.items():
        z = torch.ones_like(weight)
        for shape in (weight.shape, (1,)):
            u = torch.rand(shape)
            s = torch.sigmoid(torch.log(u / (1 - u)) + 1.0)
            z = z * (3.0 * s - 1.5).clip(0, 1)
        torch.testing.assert_close(drawn[key], z * weight, atol=1e-5, rtol=1e-4)
    closed = torch.cat([value == 0 for value in drawn.values()]).float().mean()
    assert 0.1 < closed < 0.9
    before = {key: weight.detach().clone() for key, weight in live.items()}
    settle: Any = recipe.callbacks[0]
    settle.step = 0
    optimizer = torch.optim.AdamW(live.values())
    for weight in live.values():
        optimizer.state[weight]["step"] = 1
    settle.on_step_begin(None, TrainerState(), None, optimizer=optimizer)
    assert not optimizer.state
    first, second = recipe.stand_ins(live), recipe.stand_ins(live)
    # all gates alike: they are σ(1) · 3 − 1.5 without chance, that of the matrix too
    usual = (3.0 / (1 + math.exp(-1.0)) - 1.5) ** 2
    count = round(0.01 * sum(weight.numel() for weight in live.values()))
    bar = torch.cat([weight.abs() for weight in before.values()]).sort(descending=True).values[count - 1]
    for key, weight in before.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], torch.where(weight.abs() >= bar, usual * weight, 0.0))
    assert sum(int(value.count_nonzero()) for value in first.values()) == count
    kept = recipe.finish(made.model.extract("it"))
    config_kept = kept.spec.config
    assert type(config_kept) is SparseUpdateConfig
    assert sum(place.count for place in config_kept.sparse) == count


class _Cut(TrainerCallback):
    """Ends a training as a kill would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del args, control
        if state.global_step == self.at:
            raise KeyboardInterrupt


def weights_of(loaded: LoadedBase) -> int:
    model: Any = loaded.model
    return sum(model.get_submodule(path).weight.numel() for path in linear_targets(model, TARGETS))


def test_diff_keeps_exactly_its_share_and_goes_on_after_a_cut(loaded: LoadedBase, tmp_path: Path) -> None:
    """Cut off in the last part of the steps: which weights change is in the checkpoint."""
    info, rows = tiny_task("classification"), tiny_rows("classification", 20)
    config = DiffConfig(targets=TARGETS, keep=0.03)
    whole = train(loaded, info, rows, config, QUICK, name="it")
    kept = whole.spec.config
    assert isinstance(kept, SparseUpdateConfig)
    assert whole.spec.lineage.parameters["trained_as"]["keep"] == 0.03
    assert sum(place.count for place in kept.sparse) == round(0.03 * weights_of(loaded))
    assert min(value.abs().max() for key, value in whole.tensors.items() if key.endswith("sparse_value")) > 1e-3
    with pytest.raises(KeyboardInterrupt):
        train(loaded, info, rows, config, QUICK, name="it", output_dir=tmp_path, callbacks=[_Cut(5)])
    again = train(loaded, info, rows, config, QUICK, name="it", output_dir=tmp_path)
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[key], value) for key, value in whole.tensors.items())


def test_diff_without_a_last_part_is_cut_off_at_the_end(loaded: LoadedBase) -> None:
    """At `first_rate` no weight goes further than the sum of its steps."""
    info, rows, settings = tiny_task("classification"), tiny_rows("classification", 16), replace(QUICK, epochs=1)
    config = DiffConfig(targets=TARGETS, keep=0.03, fixed=0.0, grouped=False)
    kept = train(loaded, info, rows, config, settings, name="it")
    values = torch.cat([value for key, value in kept.tensors.items() if key.endswith("sparse_value")])
    assert len(values) == round(0.03 * weights_of(loaded))
    assert 1e-5 < values.abs().max() <= 2.1e-4


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_sensitivities_are_squared_gradients_of_each_row(kind: str) -> None:
    """Against autograd on the plain model; GPT-2 keeps its weights the other way round."""
    model, oracle, batch = tiny_model(kind), tiny_model(kind), tiny_batch(kind, rows=5)
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "attention_mask": mask[mask.bool()].tolist(), "labels": number % 3}
        for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    ]
    adapter = new_adapter(model, SptConfig(sensitivity_rows=4), task=task(3))
    for key, value in adapter.head_tensors().items():
        path, _, name = key.rpartition(".")
        oracle.get_submodule(path).register_parameter(name, nn.Parameter(value))
    adapted = attach(model, {"it": adapter})
    adapted.train_only("it")
    made = Scene(adapted, "it", "classification", rows, 0, QUICK)
    config = made.config
    assert isinstance(config, SptConfig)
    found = sensitivities(made, config)
    assert not any(weight.requires_grad for weight in model.parameters())
    sums = {path: torch.zeros_like(oracle.get_submodule(path).weight) for path in config.targets}
    for row in rows[:4]:
        oracle.zero_grad()
        one = Collator(0)([row])
        functional.cross_entropy(oracle(**{key: one[key] for key in batch}).logits, one["labels"]).backward()
        for path in config.targets:
            sums[path] += oracle.get_submodule(path).weight.grad ** 2
    for path, wanted in sums.items():
        module = oracle.get_submodule(path)
        assert found[path].shape == linear_widths(module)[::-1]
        torch.testing.assert_close(
            found[path], wanted if isinstance(module, nn.Linear) else wanted.T, atol=1e-9, rtol=1e-3
        )


def test_the_split_by_hand() -> None:
    """Ranks of one: 2x3 has a LoRA of 5 numbers, 2x2 one of 4; σ is 2 of them here."""
    found = {
        "many": torch.tensor([[9.0, 8.0, 0.1], [7.0, 0.2, 0.3]]),
        "few": torch.tensor([[0.4, 6.0], [0.5, 0.0]]),
    }
    # in order: many, many, many, few: a LoRA of 5 and one entry
    made = split(found, SptConfig(rank=1, structured=0.4, budget=0.6))
    assert made.structured == ("many",)
    assert {path: index.tolist() for path, index in made.entries.items()} == {"few": [1]}
    # 5 is too much: what stands before the second of `many`
    made = split(found, SptConfig(rank=1, structured=0.4, budget=0.4))
    assert (made.structured, {path: index.tolist() for path, index in made.entries.items()}) == ((), {"many": [0]})
    # no module is whole at σ = 5 and 4: single weights alone
    made = split(found, SptConfig(rank=1, structured=1.0, budget=0.4))
    assert {path: index.tolist() for path, index in made.entries.items()} == {"many": [0, 1, 3], "few": [1]}
    assert all(index.dtype == torch.int32 for index in made.entries.values())


def test_the_split_has_the_largest_tau_that_fits() -> None:
    """Against all τ, one after the other."""
    generator = torch.Generator().manual_seed(0)
    found = {str(n): torch.rand(4 + n, 6, generator=generator) * (1 + n % 3) for n in range(5)}
    flat = sorted(((float(value), path) for path, each in found.items() for value in each.flatten()), reverse=True)
    for structured, budget in itertools.product((0.2, 0.5, 1.0), (0.05, 0.2, 0.45)):
        config = SptConfig(rank=1, structured=structured, budget=budget)
        fitting = []
        for tau in range(1, len(flat) + 1):
            counts = {path: sum(own == path for _, own in flat[:tau]) for path in found}
            lora = {path: sum(each.shape) for path, each in found.items()}
            whole = {path for path in found if counts[path] >= max(1, structured * lora[path])}
            if sum(lora[path] if path in whole else counts[path] for path in found) <= budget * len(flat):
                fitting.append((whole, counts))
        made = split(found, config)
        whole, counts = fitting[-1]
        assert set(made.structured) == whole
        assert {path: len(index) for path, index in made.entries.items()} == {
            path: count for path, count in counts.items() if count and path not in whole
        }


def test_what_is_refused(scene: Any) -> None:
    with pytest.raises(ConfigError, match=r"budget: 0\.0001 of .* is too little"):
        recipe_of(scene(SptConfig(targets=TARGETS, budget=0.0001)))
    model = tiny_model("bert")
    adapted = attach(model, {"it": new_adapter(model, SptConfig(targets=TARGETS), task=task(2))})
    made = Scene(adapted, "it", "classification", [], 0, QUICK)
    module = model.get_submodule(made.config.targets[0])
    module.weight = nn.Parameter(torch.zeros(module.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedAdapterError, match="is quantised"):
        recipe_of(made)
    for wrong in (
        lambda: DiffConfig(keep=0.0),
        lambda: DiffConfig(fixed=1.5),
        lambda: DiffConfig(penalty=-1.0),
        lambda: DiffConfig(temperature=0.0),
        lambda: DiffConfig(first_rate=0.0),
        lambda: DiffConfig(gate_start=99.0),
        lambda: DiffConfig(stretch_low=0.0),
        lambda: DiffConfig(stretch_high=1.0),
        lambda: SptConfig(budget=2.0),
        lambda: SptConfig(rank=0),
        lambda: SptConfig(sensitivity_rows=0),
        lambda: SptConfig(dropout=1.0),
        lambda: SptConfig(structured=0.0),
    ):
        with pytest.raises(ConfigError):
            wrong()

"""Ways to train a LoRA, a bottleneck or a prompt: DyLoRA, SoRA, AdapterDrop, SparseAdapter, AdaMix, P-tuning, each
against its formula.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.p_tuning import PromptEncoder
from torch import Tensor

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, attach, new_adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.targets import linear_targets
from graftory.config import (
    AdamixConfig,
    AdapterdropConfig,
    DiffConfig,
    DyloraConfig,
    PTuningConfig,
    SoraConfig,
    SparseConfig,
    SparseUpdateConfig,
    SptConfig,
)
from graftory.config.base import layer_of
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from graftory.settings import TrainSettings
from graftory.training import NO_HOOKS, Job, LoadedBase, evaluate, train
from graftory.training.company import encoded
from graftory.training.recipes import RECIPES, Scene, recipe_of
from graftory.training.recipes.adamix import disagreement
from graftory.training.recipes.adapterdrop import without_first
from graftory.training.recipes.dylora import first_ranks
from graftory.training.recipes.p_tuning import Encoder
from graftory.training.recipes.sora import pruned, shrink_
from graftory.training.recipes.sparse import kept_weights, scores
from graftory.training.trainer import Hooks
from tests.adapter_samples import logits, make
from tests.conftest import tiny_batch, tiny_model
from tests.training_samples import tiny_base, tiny_rows, tiny_task

QUICK = TrainSettings(epochs=1, batch_size=8, learning_rate=1e-2)
WAYS: dict[str, AdapterConfig] = {
    "dylora": DyloraConfig(rank=4),
    "dylora frozen": DyloraConfig(rank=4, frozen=True, rslora=True),
    "sora": SoraConfig(rank=4, sparsity=30.0),
    "adapterdrop": AdapterdropConfig(size=4, most=1),
    "sparse": SparseConfig(size=12, pruned=0.75),
    "adamix": AdamixConfig(size=4, experts=3),
    "p_tuning": PTuningConfig(length=3),
    "p_tuning lstm": PTuningConfig(length=3, encoder="lstm", hidden=6),
    "diff": DiffConfig(keep=0.02),
    "spt": SptConfig(rank=1, budget=0.05, sensitivity_rows=8),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def learnt(loaded: LoadedBase) -> dict[str, Adapter]:
    """What a short training of each makes."""
    task, rows = tiny_task("classification"), tiny_rows("classification")
    return {name: train(loaded, task, rows, config, QUICK, name="it") for name, config in WAYS.items()}


@pytest.fixture
def scene(loaded: LoadedBase) -> Iterator[Any]:
    """Makes a scene for a configuration; the model is bare again afterwards."""
    made: list[AdaptedModel] = []

    def build(config: AdapterConfig, settings: TrainSettings = QUICK) -> Scene:
        task, rows = tiny_task("classification"), tiny_rows("classification")
        adapted = AdaptedModel(loaded.model, loaded.base)
        made.append(adapted)
        adapted.add("it", new_adapter(loaded.model, config, task=rows.info(task), base=loaded.base))
        adapted.train_only("it")
        return Scene(adapted, "it", "classification", encoded(loaded, task, rows), 0, settings)

    yield build
    for adapted in made:
        adapted.detach()


def test_every_way_has_a_recipe() -> None:
    ways = set(map(type, WAYS.values()))
    assert ways <= set(RECIPES)
    for config in WAYS.values():
        assert config.stored_as in ("lora", "bottleneck", "sparse_update", "prompt")


@pytest.mark.parametrize("name", WAYS)
def test_what_is_kept_is_a_plain_adapter(
    name: str, loaded: LoadedBase, learnt: dict[str, Adapter], tmp_path: Path
) -> None:
    """Stored and got back bit for bit, measured beside others, and told how it was trained."""
    adapter, config = learnt[name], WAYS[name]
    assert adapter.spec.method == config.stored_as
    assert adapter.spec.lineage.parameters["trained_as"]["method"] == config.method
    hub = Hub.create(tmp_path)
    back = hub.get(hub.put("one", adapter))
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    rows = tiny_rows("classification")
    jobs = [Job(key, each, None, tiny_task("classification"), rows) for key, each in {"it": back, **learnt}.items()]
    (metrics, *others) = evaluate(loaded, jobs)
    same = others[list(learnt).index(name)]
    assert [metric.value for metric in metrics] == pytest.approx([metric.value for metric in same], abs=1e-5)
    assert any(
        value.abs().max() > 1e-3
        for key, value in adapter.tensors.items()
        if key.endswith(("lora_B.weight", "up.weight", "sparse_value", "smop_prompts"))
    )


def test_a_way_has_no_files_of_its_own(loaded: LoadedBase) -> None:
    adapter = new_adapter(loaded.model, WAYS["dylora"])
    with pytest.raises(UnsupportedAdapterError, match="no file format"):
        codec_of(adapter.spec)


@pytest.mark.parametrize("rslora", [False, True])
def test_dylora_trains_the_lora_that_is_cut_out(rslora: bool) -> None:
    """With the first b ranks, and alpha / b for a scale: the oracle is a LoRA of rank b of its own."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    config = DyloraConfig(rank=4, alpha=6.0, rslora=rslora)
    whole = make(model, config, seed=3)
    grown = whole.spec.config
    assert isinstance(grown, DyloraConfig)
    cut = {
        key: value[:2].contiguous() if "lora_A" in key else value[:, :2].contiguous()
        for key, value in whole.tensors.items()
    }
    small = LoraConfig(rank=2, alpha=6.0, rslora=rslora, targets=grown.targets)
    adapted = attach(model, {"it": whole, "small": replace(whole, spec=replace(whole.spec, config=small), tensors=cut)})
    with adapted.made("it", first_ranks(grown, adapted.weights("it"), 2)), adapted.route("it"):
        found = logits(adapted, batch)
    with adapted.route("small"):
        torch.testing.assert_close(found, logits(adapted, batch), atol=1e-5, rtol=1e-5)


def test_a_frozen_step_trains_one_row() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapter = make(model, DyloraConfig(rank=4, frozen=True), seed=3)
    config = adapter.spec.config
    assert isinstance(config, DyloraConfig)
    adapted = attach(model, {"it": adapter})
    adapted.train_only("it")
    live = adapted.weights("it")
    with adapted.made("it", first_ranks(config, live, 3)), adapted.route("it"):
        logits(adapted, batch).square().sum().backward()
    for key, weight in live.items():
        assert weight.grad is not None
        grad = weight.grad if "lora_A" in key else weight.grad.T
        assert [bool(row.abs().max() > 0) for row in grad] == [False, False, True, False]


def test_every_rank_is_drawn(scene: Any) -> None:
    recipe = recipe_of(scene(DyloraConfig(rank=3)))
    live = {f"{path}.{part}": torch.ones(3, 3) for path in scene_targets(recipe, scene) for part in LoraConfig.parts}
    torch.manual_seed(0)
    assert recipe.stand_ins is not None
    kept = {int(recipe.stand_ins(live)[next(iter(live))][:, 0].count_nonzero()) for _ in range(40)}
    assert kept == {1, 2, 3}


def scene_targets(recipe: Any, scene: Any) -> tuple[str, ...]:
    targets: tuple[str, ...] = recipe.stand_ins.args[0].targets
    return targets


def test_soras_proximal_step_by_hand() -> None:
    gate = torch.tensor([0.5, -0.2, 0.05, -0.05, 0.1])
    shrink_(gate, 0.1)
    torch.testing.assert_close(gate, torch.tensor([0.4, -0.1, 0.0, 0.0, 0.0]))


def test_sora_keeps_the_ranks_whose_gate_is_left() -> None:
    """The update of each module is s B diag(g) A, worked out in fp64; a module without gates is gone."""
    model = tiny_model("bert")
    adapter = make(model, SoraConfig(rank=4, alpha=10.0), labels=2)
    targets = adapter.spec.config.targets
    gates = {path: torch.tensor([0.5, 0.0, -2.0, 0.0]) for path in targets}
    gates[targets[0]] = torch.zeros(4)
    gates[targets[1]] = torch.tensor([0.0, 3.0, 0.0, 0.0])
    kept = pruned(adapter, gates)
    config = kept.spec.config
    assert type(config) is LoraConfig
    assert set(config.targets) == set(targets[1:])
    assert (config.rank, config.rank_pattern) == (2, {targets[1]: 1})
    assert kept.head_tensors().keys() == adapter.head_tensors().keys()
    for path in config.targets:
        a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        wanted = 2.5 * b @ torch.diag(gates[path].double()) @ a
        left, right = (kept.tensors[f"{path}.lora_{side}.weight"].double() for side in "BA")
        torch.testing.assert_close(config.scale_of(path) * left @ right, wanted, atol=1e-6, rtol=1e-6)
    nothing = pruned(adapter, {path: torch.zeros(4) for path in targets})
    assert nothing.spec.config.targets == targets[:1]
    assert not nothing.tensors[f"{targets[0]}.lora_B.weight"].any()


def test_sora_needs_fewer_ranks_the_larger_lambda_is(loaded: LoadedBase, learnt: dict[str, Adapter]) -> None:
    def ranks(adapter: Adapter) -> int:
        return sum(len(value) for key, value in adapter.tensors.items() if key.endswith("lora_A.weight"))

    task, rows = tiny_task("classification"), tiny_rows("classification")
    free = train(loaded, task, rows, SoraConfig(rank=4, sparsity=0.0), QUICK, name="it")
    none = train(loaded, task, rows, SoraConfig(rank=4, sparsity=1e4), QUICK, name="it")
    assert ranks(free) == 4 * len(free.spec.config.targets)
    assert ranks(none) == 1
    assert 1 <= ranks(learnt["sora"]) <= ranks(free)


def test_adapterdrop_is_the_adapter_without_its_first_layers() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapter = make(model, AdapterdropConfig(size=4, most=1), seed=2)
    targets = adapter.spec.config.targets
    rest = tuple(path for path in targets if layer_of(path) >= 1)
    assert 0 < len(rest) < len(targets)
    spec = replace(adapter.spec, config=BottleneckConfig(size=4, targets=rest))
    left = {key: value for key, value in adapter.tensors.items() if key.startswith(rest)}
    adapted = attach(model, {"it": adapter, "rest": Adapter(spec, left)})
    with adapted.made("it", without_first(targets, adapted.weights("it"), 1)), adapted.route("it"):
        found = logits(adapted, batch)
    with adapted.route("rest"):
        torch.testing.assert_close(found, logits(adapted, batch), atol=1e-6, rtol=1e-6)


def test_sparse_scores_are_weights_times_gradients(scene: Any) -> None:
    """Against finite differences: a weight's score is how much the loss falls as it goes to 0, to first order."""
    made = scene(SparseConfig(size=4, spread=0.05))
    found = scores(made)
    weights = made.model.weights("it")
    key = next(iter(found))
    place = int(found[key].argmax())
    batch = made.model

    def loss(factor: float) -> float:
        own = {name: value.detach().clone() for name, value in weights.items()}
        own[key].view(-1)[place] *= factor
        from graftory.training.encode import Collator

        with torch.no_grad(), made.model.made("it", own), made.model.route("it"):
            rows = Collator(0)(made.examples)
            labels = rows.pop("labels")
            return float(torch.nn.functional.cross_entropy(batch(**rows).logits.double(), labels, reduction="sum"))

    slope = (loss(1.5) - loss(0.5)) / 1.0
    assert abs(slope) == pytest.approx(float(found[key].view(-1)[place]), rel=0.05)


def test_sparse_keeps_the_largest_scores_of_all_tensors() -> None:
    found = {"a": torch.tensor([[5.0, 1.0], [3.0, 0.0]]), "b": torch.tensor([4.0, 2.0, 0.0, 0.0])}
    kept = kept_weights(found, 0.5)
    assert kept["a"].tolist() == [[1, 0], [1, 0]]
    assert kept["b"].tolist() == [1, 1, 0, 0]


def test_sparse_weights_stay_zero(learnt: dict[str, Adapter]) -> None:
    matrices = [value for key, value in learnt["sparse"].tensors.items() if key.endswith(("down.weight", "up.weight"))]
    zeros = sum(int((value == 0).sum()) for value in matrices)
    assert zeros == int(0.75 * sum(value.numel() for value in matrices))


def test_adamix_disagreement_by_hand() -> None:
    """Two outputs, (3/4, 1/4) and (1/4, 3/4): KL of each to (1/2, 1/2)."""
    first = torch.tensor([[3.0, 1.0, 0.0]]).log()
    second = torch.tensor([[1.0, 3.0, 0.0]]).log()
    one = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    found = disagreement("classification", first, second, torch.tensor([0]))
    torch.testing.assert_close(found, 2 * one)
    assert float(disagreement("regression", first[:, :1], first[:, :1] + 2, torch.tensor([0.0]))) == pytest.approx(2.0)


def test_adamix_keeps_the_mean_of_its_experts(scene: Any) -> None:
    made = scene(AdamixConfig(size=4, experts=3))
    recipe = recipe_of(made)
    assert recipe.extra is not None
    assert recipe.stand_ins is not None
    live = made.model.weights("it")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (*live.values(), *recipe.extra.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    kept = recipe.finish(made.model.extract("it"))
    named = dict(recipe.extra.named_parameters())
    for key, value in live.items():
        others = [named[f"{key}.{number}".replace(".", "/")] for number in (1, 2)]
        torch.testing.assert_close(kept.tensors[key], (value + others[0] + others[1]) / 3)
    drawn: list[dict[str, Tensor]] = [dict(recipe.stand_ins(live)) for _ in range(30)]
    path = made.config.targets[0]
    downs = {id(each[f"{path}.adapter_down.weight"]) for each in drawn}
    pairs = {(id(each[f"{path}.adapter_down.weight"]), id(each[f"{path}.adapter_up.weight"])) for each in drawn}
    assert len(downs) == 3
    assert len(pairs) > 3


def test_what_is_refused(loaded: LoadedBase, scene: Any) -> None:
    with pytest.raises(ConfigError, match="most: got 2 of 2 layers"):
        recipe_of(scene(AdapterdropConfig(most=2)))


def test_what_cannot_go_together_is_refused(scene: Any) -> None:
    made = scene(AdamixConfig(size=4), replace(QUICK, gradient_checkpointing=True))
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        recipe_of(made)
    recipe = recipe_of(replace(made, settings=QUICK))
    with pytest.raises(ConfigError, match="both train weights"):
        recipe.joined(Hooks(extra=torch.nn.Linear(1, 1)))
    assert recipe.joined(NO_HOOKS).extra is recipe.extra
    for config in (
        lambda: SoraConfig(sparsity=-1.0),
        lambda: AdamixConfig(experts=1),
        lambda: SparseConfig(pruned=1.0),
    ):
        with pytest.raises(ConfigError):
            config()


def test_gradient_checkpointing_runs_through_the_same_draw(loaded: LoadedBase) -> None:
    """What a step drew is in force in the backward too: the same weights come out."""
    task, rows = tiny_task("classification"), tiny_rows("classification")
    plain = train(loaded, task, rows, DyloraConfig(rank=4), QUICK, name="it")
    saved = train(loaded, task, rows, DyloraConfig(rank=4), replace(QUICK, gradient_checkpointing=True), name="it")
    for key, value in plain.tensors.items():
        torch.testing.assert_close(saved.tensors[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["diff", "spt"])
def test_a_sparse_update_is_the_base_plus_its_entries(
    name: str, loaded: LoadedBase, learnt: dict[str, Adapter]
) -> None:
    """Against a copy of the model with W + ΔW in fp64; SPT within its budget, with both of what it has."""
    adapter = learnt[name]
    config, tensors = adapter.spec.config, adapter.tensors
    plain: Any = loaded.model
    moved: Any = copy.deepcopy(plain).double()
    assert isinstance(config, SparseUpdateConfig)
    for place in config.sparse:
        flat = moved.get_submodule(place.path).weight.data.view(-1)
        flat[tensors[f"{place.path}.sparse_index"].long()] += tensors[f"{place.path}.sparse_value"].double()
    for path in config.low_rank.targets if config.low_rank else ():
        a, b = (tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        moved.get_submodule(path).weight.data += 16.0 * b @ a
    for key, value in adapter.head_tensors().items():
        path, _, part = key.rpartition(".")
        moved.get_submodule(path).register_parameter(part, torch.nn.Parameter(value.double()))
    batch = {key: value % 40 for key, value in tiny_batch("bert").items()}
    adapted = attach(loaded.model, {"it": adapter})
    with adapted.route("it"), torch.no_grad():
        torch.testing.assert_close(logits(adapted, batch).double(), logits(moved, batch), atol=1e-5, rtol=1e-5)
    adapted.detach()
    weights = sum(plain.get_submodule(path).weight.numel() for path in linear_targets(plain, ("all",)))
    numbers = sum(value.numel() for key, value in adapter.body_tensors().items() if value.is_floating_point())
    if name == "diff":
        assert numbers == round(0.02 * weights)
        return
    assert 0 < numbers <= 0.05 * weights
    assert config.sparse
    assert config.low_rank is not None
    assert not set(config.low_rank.targets) & {place.path for place in config.sparse}


# --- P-tuning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_p_tuning_s_encoder_is_peft_s(kind: str, scene: Any) -> None:
    """With the same weights, what stands in for the prompt in a step is what PEFT's encoder makes."""
    made = scene(PTuningConfig(length=3, encoder=kind, hidden=6))  # type: ignore[arg-type]
    recipe, live = recipe_of(made), made.model.weights("it")
    assert isinstance(recipe.extra, Encoder)
    assert recipe.stand_ins is not None
    (key,) = live
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=3, token_dim=live[key].shape[-1], num_transformer_submodules=1, encoder_hidden_size=6,
        encoder_reparameterization_type=kind.upper(), encoder_dropout=0.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that an MLP has no dropout and a fixed depth
        theirs: Any = PromptEncoder(config)  # type: ignore[no-untyped-call]
    theirs.embedding.weight.data.copy_(live[key][0])
    theirs.mlp_head.load_state_dict(recipe.extra.each.state_dict())
    if recipe.extra.along is not None:
        theirs.lstm_head.load_state_dict(recipe.extra.along.state_dict())
    torch.testing.assert_close(recipe.stand_ins(live)[key], theirs(torch.arange(3)[None]), atol=1e-6, rtol=1e-6)


def test_p_tuning_keeps_the_prompt_that_the_last_step_had(scene: Any) -> None:
    made = scene(PTuningConfig(length=3))
    recipe, live = recipe_of(made), made.model.weights("it")
    assert recipe.stand_ins is not None
    kept = recipe.finish(made.model.extract("it"))
    (key,) = live
    assert kept.spec.method == "prompt"
    assert torch.equal(kept.tensors[key], recipe.stand_ins(live)[key].detach())
    assert not torch.equal(kept.tensors[key], live[key])
    assert kept.head_tensors()

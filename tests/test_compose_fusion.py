"""AdapterFusion: training, regulariser, weight decay, lineage, the hub and its remotes, attention, real adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from graftory import Adapter, BottleneckConfig, Hub, LoraConfig, Parent, attach
from graftory.adapter import TaskKind
from graftory.adapters.fusion_site import watched
from graftory.compose import export, merge
from graftory.compose.attention import AttentionRecorder, attention, draw_attention
from graftory.compose.fusion import fuse, identity_penalty, new_fusion, without
from graftory.config import FusionConfig
from graftory.data import load_rows, load_task
from graftory.errors import AdapterNotFoundError, ConfigError, CorruptAdapterError, MergeError
from graftory.hub.codecs import codec_of
from graftory.settings import FusionSettings
from graftory.training import Job, LoadedBase, StepContext, evaluate, load_base
from graftory.training.trainer import Hooks
from tests.adapter_samples import logits, make, shaken
from tests.conftest import tiny_batch, tiny_model
from tests.training_samples import tiny_base, tiny_rows, tiny_task

ROOT = Path(__file__).parents[1]
QUICK = FusionSettings(epochs=6, batch_size=8, learning_rate=1e-2, warmup=0.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def parents(model: Any) -> list[Adapter]:
    return [
        make(model, LoraConfig(rank=3), labels=3, seed=1),
        make(model, BottleneckConfig(size=6, activation="gelu"), labels=2, seed=2),
        make(model, LoraConfig(rank=2, targets=("attention",)), seed=3),
    ]


def fused_in(hub: Hub, loaded: LoadedBase, **options: Any) -> Adapter:
    """A trained fusion of adapters that are in a hub."""
    adapters = parents(loaded.model)
    refs = [hub.put(f"parent{number}", adapter) for number, adapter in enumerate(adapters)]
    listed = [Parent(str(ref), hub.record(ref).digest, "composed") for ref in refs]
    kind, settings = tiny_task("classification"), options.pop("settings", QUICK)
    return fuse(loaded, kind, tiny_rows("classification"), adapters, settings=settings, parents=listed, **options)


def loras_meet(weights: tuple[float | None, ...]) -> bool:
    return weights[0] is not None and weights[2] is not None


def values_of(adapter: Adapter) -> Mapping[str, torch.Tensor]:
    return {key: value for key, value in adapter.tensors.items() if key.endswith("_value.weight")}


def test_training_lowers_the_loss_and_leaves_sources_and_base(loaded: LoadedBase) -> None:
    adapters, rows, task = parents(loaded.model), tiny_rows("classification"), tiny_task("classification")
    before = [{key: value.clone() for key, value in each.tensors.items()} for each in adapters]
    base = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    fused = fuse(loaded, task, rows, adapters, settings=QUICK)
    start = fuse(loaded, task, rows, adapters, settings=replace(QUICK, max_steps=1, learning_rate=1e-9))
    first, last = evaluate(loaded, [Job("start", start, None, task, rows), Job("fused", fused, None, task, rows)])
    assert last[1].value < 0.7 * first[1].value
    for each, kept in zip(adapters, before, strict=True):
        assert all(torch.equal(each.tensors[key], value) for key, value in kept.items())
    assert all(torch.equal(loaded.model.state_dict()[key], value) for key, value in base.items())
    assert all(after is each for after, each in zip(fused.sources, adapters, strict=True))
    assert fused.spec.task is not None
    assert fused.spec.task.head == ("classifier",)
    assert (fused.spec.lineage.process, fused.spec.lineage.parameters["method"]) == ("compose", "fusion")


def test_the_initial_tensors_are_the_paper_s(loaded: LoadedBase) -> None:
    fresh = new_fusion(loaded.model, parents(loaded.model))
    off = 1 - torch.eye(32)
    for key, tensor in fresh.tensors.items():
        if key.endswith("_value.weight"):
            assert torch.equal(tensor, torch.eye(32) + 1e-6 * off)
        elif key.endswith("bias"):
            assert not tensor.any()
        else:
            assert 0.018 < tensor.std() < 0.022
    again = new_fusion(loaded.model, parents(loaded.model), FusionConfig(init_seed=1))
    assert any(not torch.equal(again.tensors[key], value) for key, value in fresh.tensors.items())


def test_the_penalty_is_the_squared_distance_to_the_identity_and_its_gradient_twice_the_distance(
    loaded: LoadedBase,
) -> None:
    fused = shaken(new_fusion(loaded.model, parents(loaded.model)))
    adapted = attach(loaded.model, {"f": fused})
    adapted.train_only("f")
    term = identity_penalty("f", 0.01)(StepContext(adapted, {}, None, 0))["identity"]
    wanted = 0.01 * sum(((value - torch.eye(32)) ** 2).sum() for value in values_of(fused).values())
    torch.testing.assert_close(term, torch.as_tensor(wanted))
    term.backward()
    gradients = {key: weight.grad for key, weight in adapted.weights("f").items()}
    for key, gradient in gradients.items():
        if key in values_of(fused):
            torch.testing.assert_close(gradient, 0.02 * (fused.tensors[key] - torch.eye(32)))
        else:
            assert gradient is None
    adapted.detach()


def test_the_penalty_keeps_v_at_the_identity(loaded: LoadedBase) -> None:
    distances = []
    for factor in (0.0, 10.0):
        rows, task = tiny_rows("classification"), tiny_task("classification")
        fused = fuse(loaded, task, rows, parents(loaded.model), FusionConfig(regularisation=factor), QUICK)
        distances.append(sum(float((value - torch.eye(32)).norm()) for value in values_of(fused).values()))
    assert distances[1] < 0.5 * distances[0]


def test_v_has_no_weight_decay(loaded: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no learning rate to speak of but an immense decay, what decays shrinks to nothing and V stays."""
    heavy = replace(QUICK, weight_decay=1e7, learning_rate=1e-8, epochs=1)
    rows, task, adapters = tiny_rows("classification"), tiny_task("classification"), parents(loaded.model)
    start = new_fusion(loaded.model, adapters)
    fused = fuse(loaded, task, rows, adapters, settings=heavy)
    for key, value in fused.tensors.items():
        if key in values_of(fused):
            torch.testing.assert_close(value, start.tensors[key], atol=1e-6, rtol=0)
        elif key.endswith("lora_query.weight"):
            assert value.norm() < 0.95 * start.tensors[key].norm()
    assert Hooks().undecayed == ()


def test_a_training_that_was_cut_off_goes_on(loaded: LoadedBase, tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=2, save_steps=2)
    rows, task, adapters = tiny_rows("classification"), tiny_task("classification"), parents(loaded.model)
    whole = fuse(loaded, task, rows, adapters, settings=settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(loaded, task, rows, adapters, settings=settings, output_dir=tmp_path / "c", callbacks=[Stop()])
    resumed = fuse(loaded, task, rows, adapters, settings=settings, output_dir=tmp_path / "c")
    for key, value in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[key], value, atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match="another training"):
        fuse(loaded, task, rows, adapters[::-1], settings=settings, output_dir=tmp_path / "c")


def test_it_travels_with_its_parents(loaded: LoadedBase, tmp_path: Path) -> None:
    here, there = Hub.create(tmp_path / "here"), Hub.create(tmp_path / "there")
    fused = fused_in(here, loaded)
    ref = here.put("fused", fused)
    assert [parent.ref for parent in here.record(ref).spec.lineage.parents] == ["parent0@1", "parent1@1", "parent2@1"]
    here.push(ref, f"file://{tmp_path / 'remote'}")
    delivery = there.pull(f"file://{tmp_path / 'remote'}/fused@1")
    assert {str(parent) for parent in delivery.parents} == {"parent0@1", "parent1@1", "parent2@1"}
    assert there.verify().ok
    back = there.get("fused@1")
    assert back.spec == fused.spec
    assert all(torch.equal(back.tensors[key], value) for key, value in fused.tensors.items())
    adapted = attach(loaded.model, {"before": fused, "after": back})
    batch = tiny_batch("bert", rows=4)
    batch["input_ids"] %= 44
    with adapted.route(["before", "after"] * 2), torch.no_grad():
        outputs = logits(adapted, {key: value[[0, 0, 1, 1]] for key, value in batch.items()})
    adapted.detach()
    assert torch.equal(outputs[::2], outputs[1::2])
    with pytest.raises(AdapterNotFoundError, match=r"works on 3 adapters and has 2 with it: parent2@1 missing; get it"):
        attach(loaded.model, {"f": replace(fused, sources=fused.sources[:2])})


def test_files_that_disagree_with_the_specification_are_refused(loaded: LoadedBase) -> None:
    fused = new_fusion(loaded.model, parents(loaded.model))
    codec = codec_of(fused.spec)
    key = next(iter(fused.tensors))
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**fused.tensors, key: torch.zeros(3, 3)}, r"is \(3, 3\), the specification wants \(32, 32\)"),
        ({name: value for name, value in fused.tensors.items() if name != key}, "is none"),
        ({**fused.tensors, "strange.weight": torch.zeros(2)}, r"is \(2,\), the specification wants none"),
    ]
    for tensors, text in bad:
        with pytest.raises(CorruptAdapterError, match=text):
            codec.check(codec.encode(replace(fused, tensors=tensors)), fused.spec)
    config = fused.spec.config
    assert isinstance(config, FusionConfig)
    for changes in ({"sources": 1}, {"places": (*config.places, config.places[0])}, {"targets": ()}):
        with pytest.raises(ConfigError, match="places"):
            replace(config, **changes)


def test_attention_is_a_mean_over_real_tokens_and_sums_to_one(loaded: LoadedBase) -> None:
    fused = shaken(new_fusion(loaded.model, parents(loaded.model)))
    task, rows = tiny_task("classification"), tiny_rows("classification", rows=9)
    table = attention(loaded, fused, task, rows)
    by_one = attention(loaded, fused, task, rows, batch_size=1)
    assert table.sources == ("task3", "task2", "source 3")
    config = fused.spec.config
    assert isinstance(config, FusionConfig)
    assert len(table.places) == len(config.places)
    for place, alone, wanted in zip(table.places, by_one.places, config.places, strict=True):
        weights = [weight for weight in place.weights if weight is not None]
        assert sum(weights) == pytest.approx(1)
        assert place.weights == pytest.approx(alone.weights, abs=1e-5)  # padding does not count
        assert tuple(n for n, weight in enumerate(place.weights) if weight is not None) == wanted.sources
    assert max(max(filter(None, place.weights)) for place in table.places if None in place.weights) > 0.55
    assert len(set(table.labels())) == len(table.places)
    shared = [place.weights for place in table.places if loras_meet(place.weights)]
    assert table.mean()[0] == pytest.approx(sum(weights[0] or 0.0 for weights in shared) / len(shared))
    assert table.mean()[1] is None  # the bottleneck meets no LoRA
    assert draw_attention([table, table]).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_language_models_fuse_and_padding_does_not_count(kind: TaskKind, tmp_path: Path) -> None:
    base, task, rows = tiny_base(kind, tmp_path), tiny_task(kind), tiny_rows(kind, rows=12)
    lengths = tuple(str(target) + " w1 w2 w3"[: 3 * (n % 4)] for n, target in enumerate(rows.targets))
    rows = replace(rows, targets=lengths)
    sources = [
        make(base.model, config, seed=seed)
        for seed, config in enumerate(
            (LoraConfig(), LoraConfig(targets=("all",)), BottleneckConfig(), BottleneckConfig(size=3))
        )
    ]
    start, fused = (
        fuse(base, task, rows, sources, settings=replace(QUICK, learning_rate=rate)) for rate in (1e-9, 1e-2)
    )
    first, last = evaluate(base, [Job("start", start, None, task, rows), Job("fused", fused, None, task, rows)])
    assert last[0].value < 0.9 * first[0].value
    many, alone = (attention(base, fused, task, rows, batch_size=size) for size in (12, 1))
    assert any(max(filter(None, place.weights)) > 0.55 for place in many.places if None not in place.weights[2:])
    for place, wanted in zip(many.places, alone.places, strict=True):
        assert place.weights == pytest.approx(wanted.weights, abs=1e-5)


def test_attention_of_rows_that_use_other_adapters_is_not_counted() -> None:
    model = tiny_model("bert")
    adapters = parents(model)
    one, two = (shaken(new_fusion(model, adapters), seed) for seed in (1, 2))
    adapted = attach(model, {"one": one, "two": two, "plain": adapters[0]})
    batch = tiny_batch("bert", rows=4)
    mixed, single = AttentionRecorder(), AttentionRecorder()
    mixed.mask, single.mask = batch["attention_mask"], batch["attention_mask"][2:3]
    with torch.no_grad():
        with adapted.route(["two", None, "one", "plain"], "plain"), watched(mixed):
            adapted(**batch)
        with adapted.route("one", "plain"), watched(single):
            adapted(**{key: value[2:3] for key, value in batch.items()})
    for place, alone in zip(mixed.mean(adapted, "one"), single.mean(adapted, "one"), strict=True):
        assert place.weights == pytest.approx(alone.weights, abs=1e-5)
    assert mixed.mean(adapted, "one") != mixed.mean(adapted, "two")


def test_a_fusion_is_neither_exported_nor_merged(loaded: LoadedBase) -> None:
    fused = new_fusion(loaded.model, parents(loaded.model))
    with pytest.raises(MergeError, match=r"fusion .* export a lora adapter"):
        export(loaded.model, fused)
    with pytest.raises(MergeError, match="cannot merge fusion adapters"):
        merge([fused, fused])


@pytest.mark.real
def test_real_adapters_of_the_checkout_fuse_on_minilm() -> None:
    hub = Hub.open(ROOT)
    loaded, task = load_base("wheel:minilm", "classification"), load_task("wheel:trec")
    rows, test = load_rows(task, "train", limit=96), load_rows(task, "test", limit=60)
    sources = [hub.get(ref) for ref in ("trec", "sms", "disaster")]
    settings = FusionSettings(max_steps=24, batch_size=8)
    start, fused = (
        fuse(loaded, task, rows, sources, settings=each)
        for each in (replace(settings, max_steps=1, learning_rate=1e-9), settings)
    )
    config = fused.spec.config
    assert isinstance(config, FusionConfig)
    assert {place.track for place in config.places} == {"lora", "serial"}
    # with trec's own head, and trec alone: only what little V has moved sets it apart from trec
    headed = replace(start, tensors={**start.body_tensors(), **sources[0].head_tensors()})
    alone = without(without(headed, 2), 1)
    jobs = [Job(str(n), each, None, task, test) for n, each in enumerate((sources[0], alone, start, fused))]
    single, left, before, after = evaluate(loaded, jobs)
    assert single[0].value > 0.8
    assert left[1].value == pytest.approx(single[1].value, abs=0.01)
    assert after[1].value < before[1].value - 0.1

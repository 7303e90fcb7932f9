"""Hyperformer against the formula written out in float64, and what must stay as it is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from graftory import Adapter, Hub, Parent, attach
from graftory.adapter import TaskKind
from graftory.compose import export, merge
from graftory.compose.fusion import new_fusion
from graftory.compose.hyperformer import add_task, generate, hyperformer, new_hyperformer, task_adapter
from graftory.compose.hyperformer.sampler import TaskSampler, probabilities
from graftory.config import HyperformerConfig, HyperTask, NormedBottleneckConfig
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError, CorruptAdapterError, MergeError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from graftory.hub.completeness import gaps
from graftory.settings import HyperformerSettings
from graftory.training import Job, LoadedBase, evaluate
from tests.adapter_samples import make, shaken
from tests.conftest import tiny_batch, tiny_model
from tests.training_samples import tiny_base, tiny_rows, tiny_task

SMALL = HyperformerConfig(size=5, embedding=6, hidden=7)
RATES = ("learning_rate", "embedding_learning_rate", "head_learning_rate")


def at_rates(rate: float, **fields: Any) -> HyperformerSettings:
    return HyperformerSettings(
        epochs=100,
        batch_size=8,
        warmup=0.0,
        learning_rate=rate,
        embedding_learning_rate=rate,
        head_learning_rate=rate,
        **fields,
    )


QUICK = at_rates(2e-2, max_steps=30)
STILL = at_rates(1e-12, max_steps=1)
"""A training that moves nothing far."""
KINDS = [{}, {"shared": False}, {"generates": "lora"}, {"generates": "lora", "shared": False}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def two_tasks(kind: TaskKind = "classification") -> list[tuple[TaskFile, Rows]]:
    rows = tiny_rows(kind)
    return [(replace(tiny_task(kind), name="one"), rows), (replace(tiny_task(kind), name="two"), rows.subsample(9, 0))]


def make_hyper(model: Any, **fields: Any) -> Adapter:
    tasks = [HyperTask(name="one", kind="classification"), HyperTask(name="two", kind="classification")]
    return new_hyperformer(model, tasks, replace(SMALL, **fields))


@pytest.mark.parametrize("fields", KINDS)
def test_what_is_generated_is_the_formula(fields: dict[str, Any]) -> None:
    hyper = shaken(make_hyper(tiny_model("bert"), **fields))
    config = hyper.spec.config
    assert isinstance(config, HyperformerConfig)
    t = {name: value.double().tolist() for name, value in hyper.tensors.items()}

    def linear(name: str, x: list[float]) -> list[float]:
        return [
            sum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(t[f"{name}.weight"], t[f"{name}.bias"], strict=True)
        ]

    made = generate(config, hyper.tensors, 1)
    assert set(made) == {f"{p.path}.{part}" for p in config.places for part in config.made_at(p)}
    for place in config.places:
        z = t["tasks.1.embedding"]
        if config.shared:
            z = z + t["encoder.layers"][place.layer] + t["encoder.positions"][place.position]
        out = linear("encoder.project_out", [max(0.0, v) for v in linear("encoder.project_in", z)])
        mean = sum(out) / len(out)
        spread = math.sqrt(sum((v - mean) ** 2 for v in out) / len(out) + 1e-5)
        gains = zip(out, t["encoder.norm.weight"], t["encoder.norm.bias"], strict=True)
        source = [(v - mean) / spread * gain + shift for v, gain, shift in gains]
        for part, shape in config.made_at(place).items():
            wanted = torch.tensor(linear(config.maker(place, part), source)).view(shape)
            torch.testing.assert_close(made[f"{place.path}.{part}"], wanted.float(), atol=1e-5, rtol=1e-5)


def test_layers_and_positions_are_numbered_in_the_order_of_the_model() -> None:
    config = make_hyper(tiny_model("bert")).spec.config
    assert isinstance(config, HyperformerConfig)
    assert [(place.layer, place.position) for place in config.places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [place.path.endswith("attention.output.dense") for place in config.places] == [True, False] * 2
    decoder = make_hyper(tiny_model("t5")).spec.config
    assert isinstance(decoder, HyperformerConfig)
    assert decoder.stacks == ("decoder", "encoder")
    assert {p.position for p in decoder.places if p.stack == "decoder"} == {0, 1, 2}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("fields", KINDS)
def test_it_starts_as_the_bare_base(family: str, fields: dict[str, Any]) -> None:
    model = tiny_model(family)
    hyper = make_hyper(model, **fields)
    batch = tiny_batch(family)
    with torch.no_grad():
        before = model(**batch).logits
    adapted = attach(model, {name: task_adapter(hyper, name) for name in ("one", "two")}, check_base=False)
    with adapted.route("one"), torch.no_grad():
        start = adapted(**batch).logits
    adapted.detach()
    assert float((start - before).abs().max()) <= 1e-3
    changed = shaken(hyper)
    adapted = attach(model, {name: task_adapter(changed, name) for name in ("one", "two")}, check_base=False)
    outputs = []
    for name in ("one", "two"):
        with adapted.route(name), torch.no_grad():
            outputs.append(adapted(**batch).logits)
    adapted.detach()
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-5
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


def test_the_norm_behind_a_bottleneck_and_a_mixed_batch() -> None:
    """h + LN(U act(D h + c) + e), worked out at one site; rows of other methods stay what they are."""
    model = tiny_model("bert")
    one = make(model, NormedBottleneckConfig(placement="houlsby", size=4, activation="gelu"), seed=1)
    other = make(model, NormedBottleneckConfig(placement="houlsby", size=6, activation="gelu"), seed=2)
    path = one.spec.config.targets[0]
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    before = model.get_submodule(path).register_forward_hook(see("h"))
    adapted = attach(model, {"one": one, "other": other}, check_base=False)
    after = model.get_submodule(path).register_forward_hook(see("y"))
    batch = tiny_batch("bert", rows=4)
    with torch.no_grad(), adapted.route(["one", "other", None, "one"]):
        mixed = adapted(**batch).logits
    before.remove()
    after.remove()
    d, c, u, e, gain, shift = (one.tensors[f"{path}.{part}"].double() for part in one.spec.config.parts)
    h = seen["h"].double()
    inner = torch.nn.functional.gelu(h @ d.T + c) @ u.T + e
    centred = inner - inner.mean(-1, keepdim=True)
    wanted = h + centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift
    torch.testing.assert_close(seen["y"][[0, 3]].double(), wanted[[0, 3]], atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["y"][2], seen["h"][2])
    for row, name in enumerate(["one", "other", None, "one"]):
        with torch.no_grad(), adapted.route(name):
            alone = adapted(**{key: value[row : row + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(alone[0], mixed[row], atol=1e-5, rtol=1e-5)
    adapted.detach()


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("kind", ["classification", "causal_lm", "seq2seq"])
def test_training_lowers_the_loss_of_both_tasks(kind: TaskKind, fields: dict[str, Any], tmp_path: Any) -> None:
    loaded, tasks = tiny_base(kind, tmp_path), two_tasks(kind)
    base = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    trained = hyperformer(loaded, tasks, replace(SMALL, **fields), QUICK)
    start = hyperformer(loaded, tasks, replace(SMALL, **fields), STILL)
    for task, rows in tasks:
        jobs = [
            Job(which, task_adapter(hyper, task.name), None, task, rows)
            for which, hyper in (("a", start), ("b", trained))
        ]
        first, last = evaluate(loaded, jobs)
        assert last[-1].value < 0.95 * first[-1].value
    assert all(torch.equal(loaded.model.state_dict()[key], value) for key, value in base.items())
    moved = {name for name, value in trained.tensors.items() if not torch.equal(value, start.tensors[name])}
    still = {name for name in trained.tensors.keys() - moved if not name.endswith("key.bias")}
    assert not still, "every tensor learns"


@pytest.mark.parametrize("rate", RATES)
def test_generator_embeddings_and_heads_have_rates_of_their_own(loaded: LoadedBase, rate: str) -> None:
    start = hyperformer(loaded, two_tasks(), SMALL, STILL)
    more: dict[str, Any] = {rate: 1e-2}
    moved = hyperformer(loaded, two_tasks(), SMALL, replace(STILL, **more))
    far = {name for name, value in moved.tensors.items() if (value - start.tensors[name]).abs().max() > 1e-4}
    begin, middle, end = {
        "learning_rate": ("encoder.", "", ""),
        "embedding_learning_rate": ("tasks.", "", ".embedding"),
        "head_learning_rate": ("tasks.", ".head.", ""),
    }[rate]
    assert far
    assert all(name.startswith(begin) and middle in name and name.endswith(end) for name in far)


def test_a_new_task_learns_its_embedding_and_head_alone(loaded: LoadedBase) -> None:
    tasks = two_tasks()
    hyper = hyperformer(loaded, tasks[:1], SMALL, QUICK)
    grown = add_task(
        loaded, hyper, *tasks[1], settings=QUICK, parent=Parent("many@1", "sha256:" + "0" * 64, "continued")
    )
    assert all(torch.equal(grown.tensors[name], value) for name, value in hyper.tensors.items())
    more = set(grown.tensors) - set(hyper.tensors)
    assert more == {"tasks.1.embedding", "tasks.1.head.classifier.weight", "tasks.1.head.classifier.bias"}
    untrained = add_task(loaded, hyper, *tasks[1], settings=STILL)
    assert not torch.equal(grown.tensors["tasks.1.embedding"], untrained.tensors["tasks.1.embedding"])
    assert [parent.relation for parent in grown.spec.lineage.parents] == ["continued"]
    with pytest.raises(ConfigError, match="each may be there once"):
        add_task(loaded, grown, *tasks[1], settings=QUICK)


def test_a_training_that_was_cut_off_goes_on(loaded: LoadedBase, tmp_path: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 12:
                raise KeyboardInterrupt

    settings = replace(QUICK, save_steps=5, max_steps=20)
    whole = hyperformer(loaded, two_tasks(), SMALL, settings)
    with pytest.raises(KeyboardInterrupt):
        hyperformer(loaded, two_tasks(), SMALL, settings, output_dir=tmp_path / "c", callbacks=[Stop()])
    resumed = hyperformer(loaded, two_tasks(), SMALL, settings, output_dir=tmp_path / "c")
    for key, value in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[key], value, atol=1e-6, rtol=1e-6)


def test_tasks_are_drawn_with_a_temperature() -> None:
    assert probabilities([1000, 10], 1.0) == pytest.approx([1000 / 1010, 10 / 1010])
    large, small = 1000**0.1, 10**0.1
    assert probabilities([1000, 10], 10.0) == pytest.approx([large / (large + small), small / (large + small)])
    sampler = TaskSampler([4000, 40], 8, 10.0, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 4040
    batches = [order[at : at + 8] for at in range(0, len(order), 8)]
    assert all(len({row < 4000 for row in batch}) == 1 for batch in batches)
    share = sum(batch[0] < 4000 for batch in batches) / len(batches)
    assert share == pytest.approx(probabilities([4000, 40], 10.0)[0], abs=0.06)
    counted = Counter(row for row in order if row >= 4000)
    assert len(counted) == 40
    assert max(counted.values()) - min(counted.values()) <= 1
    assert list(TaskSampler([4000, 40], 8, 10.0, seed=1)) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_it_is_kept_and_read_back_and_damage_is_refused(loaded: LoadedBase, tmp_path: Any) -> None:
    hub = Hub.create(tmp_path / "hub")
    hyper = hyperformer(loaded, two_tasks(), SMALL, replace(QUICK, max_steps=2), sources=["one.yaml", "two.yaml"])
    hub.put("many", hyper)
    back = hub.get("many")
    assert back.spec == hyper.spec
    assert all(torch.equal(back.tensors[key], value) for key, value in hyper.tensors.items())
    plain = task_adapter(back, "two", parent=Parent("many@1", hub.record("many").digest, "generated"))
    hub.put("two", plain)
    again = hub.get("two")
    assert again.spec.task is not None
    assert (again.spec.task.name, again.spec.lineage.parameters["task_source"]) == ("two", "two.yaml")
    assert [data["relation"] for *_, data in hub.lineage("two").edges(data=True)] == ["generated"]
    assert hub.verify().ok
    assert {gap.field for gap in gaps(hub.record("many"))} == {"metrics", "licence"}
    assert {gap.field for gap in gaps(hub.record("two"))} == {"metrics", "licence"}
    codec, broken = codec_of(hyper.spec), dict(hyper.tensors)
    broken["encoder.layers"] = torch.zeros(3, 6)
    with pytest.raises(CorruptAdapterError, match=r"'encoder.layers' is"):
        codec.check(codec.encode(Adapter(hyper.spec, broken)), hyper.spec)


def test_what_it_cannot_do_is_said(loaded: LoadedBase) -> None:
    hyper = make_hyper(loaded.model)
    with pytest.raises(UnsupportedAdapterError, match=r"hub compose export-task"):
        attach(loaded.model, {"x": hyper})
    with pytest.raises(MergeError, match="hub compose export-task"):
        export(loaded.model, hyper)
    with pytest.raises(MergeError, match="cannot merge hyperformer"):
        merge([hyper, hyper])
    with pytest.raises(UnsupportedAdapterError, match=r"no task 'three' in this hyperformer; it has one, two"):
        task_adapter(hyper, "three")
    plain = task_adapter(hyper, "one")
    with pytest.raises(UnsupportedAdapterError, match="a hyperformer"):
        task_adapter(plain, "one")
    with pytest.raises(UnsupportedAdapterError, match="normed_bottleneck adapter cannot be fused"):
        new_fusion(loaded.model, [plain, plain])
    with pytest.raises(ConfigError, match="tasks of one kind"):
        hyperformer(loaded, [*two_tasks(), *two_tasks("regression")], SMALL, QUICK)


def test_heads_can_start_at_what_the_generated_adapters_say(loaded: LoadedBase) -> None:
    rows = tiny_rows("classification", 60)
    tasks = [(replace(tiny_task("classification"), name=name), rows) for name in ("one", "two")]
    still = replace(STILL, learning_rate=1e-30, head_learning_rate=1e-30, embedding_learning_rate=1e-30)
    probed = hyperformer(loaded, tasks, SMALL, replace(still, head_start="probe"))
    random = hyperformer(loaded, tasks, SMALL, still)
    more = add_task(loaded, probed, replace(tasks[0][0], name="three"), rows, replace(still, head_start="probe"))
    for hyper, name, right in (
        (probed, "one", True),
        (probed, "two", True),
        (more, "three", True),
        (random, "two", False),
    ):
        job = Job(name, task_adapter(hyper, name), None, tasks[0][0], rows)
        assert (evaluate(loaded, [job])[0][0].value > 0.85) == right

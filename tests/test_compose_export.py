"""Exported models against plain PEFT, and against what transformers loads from the folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Metric, TaskInfo
from graftory.adapters import attach, base_of, new_adapter
from graftory.compose import export, merge, save_export, verify_export
from graftory.config import BottleneckConfig, LoraConfig
from graftory.errors import BaseMismatchError, ConfigError, MergeError, ShapeError

TASK = TaskInfo("colours", "classification", ("red", "green", "blue"), head=("classifier",))
IDS = torch.tensor([[3, 5, 7, 9], [4, 6, 8, 2]])


# transformers 5.23 warns of a name that PEFT 0.21 still uses
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def made(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config).eval()


def bert() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    return made(BertForSequenceClassification, BertConfig(**sizes, intermediate_size=24))


def gpt2() -> Any:
    return made(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2),
    )


def llama(tied: bool) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    return made(LlamaForCausalLM, LlamaConfig(**sizes, intermediate_size=24, tie_word_embeddings=tied))


def with_peft(model: Any, targets: list[str], **fields: Any) -> tuple[Tensor, Adapter]:
    """The logits of plain PEFT with random factors, and the same adapter as data."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **fields)).eval()
    torch.manual_seed(1)
    tensors, paths = {}, []
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            key = name.removeprefix("base_model.model.").replace(".default", "")
            tensors[key] = parameter.detach().clone()
            paths.append(key.split(".lora_")[0])
    with torch.no_grad():
        logits = wrapped(input_ids=IDS).logits
    config = LoraConfig(rank=4, alpha=6.0, targets=tuple(dict.fromkeys(paths)), rslora=fields.get("use_rslora", False))
    unloaded: Any = wrapped.unload()
    return logits, Adapter(AdapterSpec(base_of(unloaded), config), tensors)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def with_head(adapter: Adapter, task: TaskInfo = TASK, width: int = 16) -> Adapter:
    torch.manual_seed(2)
    head = {"classifier.weight": torch.randn(task.outputs, width), "classifier.bias": torch.randn(task.outputs)}
    metric = Metric("accuracy", 0.875, "colours.csv", "test", 8)
    return Adapter(
        AdapterSpec(adapter.spec.base, adapter.spec.config, task, metrics=(metric,)), {**adapter.tensors, **head}
    )


@pytest.mark.parametrize(
    ("make", "targets", "fields"),
    [
        (bert, ["query", "value", "dense"], {}),
        (bert, ["query", "value"], {"use_rslora": True}),
        (gpt2, ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
        (lambda: llama(False), ["q_proj", "down_proj", "lm_head"], {}),
        (lambda: llama(True), ["q_proj"], {}),
    ],
)
def test_exported_logits_are_those_of_plain_peft(make: Any, targets: list[str], fields: dict[str, Any]) -> None:
    wanted, adapter = with_peft(make(), targets, **fields)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits_of(model)
    exported = export(model, adapter)
    assert (wanted - plain).abs().max() > 1e-2
    assert (logits_of(exported) - wanted).abs().max() < 1e-5
    assert type(exported) is type(model)
    assert list(exported.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_head_comes_along_whatever_its_size_and_transformers_alone_loads_it(tmp_path: Path) -> None:
    adapter = with_head(with_peft(bert(), ["query", "value"])[1])
    exported = export(bert(), adapter)
    folder = save_export(exported, None, tmp_path / "new" / "plain", adapter=adapter)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    assert logits_of(loaded).shape == (2, 3)
    assert torch.equal(logits_of(loaded.eval()), logits_of(exported))
    assert loaded.config.num_labels == 3
    assert loaded.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert loaded.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert loaded.config.problem_type == "single_label_classification"
    assert loaded(input_ids=IDS, labels=torch.tensor([2, 0])).loss.isfinite()
    assert "accuracy 0.8750 on colours.csv" in (folder / "README.md").read_text()
    hidden = bert().base_model(input_ids=IDS)
    assert not torch.allclose(hidden.pooler_output @ adapter.tensors["classifier.weight"].T, logits_of(loaded))


def test_regression_head_sets_its_problem_type() -> None:
    task = TaskInfo("score", "regression", head=("classifier",))
    exported = export(bert(), with_head(with_peft(bert(), ["query"])[1], task))
    assert logits_of(exported).shape == (2, 1)
    assert exported.config.problem_type == "regression"
    assert exported.config.num_labels == 1


def test_a_merged_adapter_takes_the_head_of_one_task() -> None:
    body = with_peft(bert(), ["query"])[1]
    headed = with_head(body)
    exported = export(bert(), merge([body, headed]), head=headed)
    assert torch.equal(exported.get_parameter("classifier.weight"), headed.tensors["classifier.weight"])


def test_tied_weights_are_refused_not_changed_twice() -> None:
    _, adapter = with_peft(llama(False), ["lm_head"])
    base = BaseModel("tiny")
    with pytest.raises(MergeError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        export(llama(True), Adapter(AdapterSpec(base, adapter.spec.config), adapter.tensors))


def test_a_tied_model_stays_tied_on_disk(tmp_path: Path) -> None:
    wanted, adapter = with_peft(llama(True), ["q_proj"])
    folder = save_export(export(llama(True), adapter), None, tmp_path / "plain")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (logits_of(loaded.eval()) - wanted).abs().max() < 1e-5


def test_bottleneck_is_refused_with_what_can_be_done() -> None:
    adapter = Adapter(AdapterSpec(base_of(bert()), BottleneckConfig()), {})
    with pytest.raises(MergeError, match=r"non-linearity.*lora.*attach\(\)"):
        export(bert(), adapter)


def test_another_base_is_refused() -> None:
    adapter = with_peft(bert(), ["query"])[1]
    other = bert()
    with torch.no_grad():
        other.get_parameter("bert.embeddings.word_embeddings.weight").add_(1.0)
    with pytest.raises(BaseMismatchError, match="pass the right base"):
        export(other, adapter)


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        save_export(model, None, full)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]

    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("graftory.compose.card.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        save_export(model, None, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    save_export(model, None, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": IDS}, {"input_ids": IDS[:1, :3], "attention_mask": torch.tensor([[1, 1, 0]])}]


def test_verify_measures_the_difference_on_real_rows() -> None:
    adapter = with_head(with_peft(bert(), ["query", "value", "dense"])[1])
    exported = export(bert(), adapter)
    adapted = attach(bert(), {"colours": adapter})
    check = verify_export(adapted, exported, batches())
    assert check.n == 3
    assert check.max_difference < 1e-5
    with torch.no_grad():
        exported.get_parameter("classifier.bias")[1] += 0.5
    assert verify_export(adapted, exported, batches()).max_difference == pytest.approx(0.5, abs=1e-5)


def test_verify_of_a_merged_body_with_the_head_of_one_task() -> None:
    body = with_peft(bert(), ["query", "value"])[1]
    headed = with_head(body)
    merged = merge([body, headed])
    adapted = attach(bert(), {"merged": merged, "colours": headed})
    check = verify_export(adapted, export(bert(), merged, head=headed), batches(), name="merged", head="colours")
    assert check.max_difference < 1e-5
    with pytest.raises(MergeError, match="name the exported one: merged, colours"):
        verify_export(adapted, bert(), batches())
    with pytest.raises(MergeError, match="no batches"):
        verify_export(adapted, bert(), [], name="merged")
    with pytest.raises(ShapeError, match="gives logits"):
        verify_export(adapted, bert(), batches(), name="colours")
    with pytest.raises(MergeError, match=r"call detach\(\) first"):
        export(cast(Any, adapted), merged)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_merged_bodies_act_in_a_model_as_the_mixture_of_their_parents(weight: float) -> None:
    """One site, so that what later layers make of it cannot differ: a mixture's update is the weighted sum."""
    path = "bert.encoder.layer.0.output.dense"
    one, two = with_peft(bert(), ["layer.0.output.dense"])[1], with_peft(bert(), ["layer.0.output.dense"])[1]
    two = Adapter(two.spec, {key: tensor + 0.1 for key, tensor in two.tensors.items()})
    assert one.spec.config.targets == (path,)
    adapted = attach(bert(), {"one": one, "two": two, "both": merge([one, two], weights=[weight, 1 - weight])})
    with torch.no_grad(), adapted.route([{"one": weight, "two": 1 - weight}, "both"]):
        logits = adapted(input_ids=IDS[:1].repeat(2, 1)).logits
    with torch.no_grad(), adapted.route(None):
        bare = adapted(input_ids=IDS[:1]).logits
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    assert (logits[0] - bare[0]).abs().max() > 1e-2


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_identity_merge_of_a_bottleneck_keeps_the_logits(placement: Any) -> None:
    config = BottleneckConfig(placement=placement, size=4, scale=1.5, activation="gelu")
    fresh = new_adapter(bert(), config)
    torch.manual_seed(3)
    adapter = Adapter(fresh.spec, {key: torch.randn_like(tensor) for key, tensor in fresh.tensors.items()})
    adapted = attach(bert(), {"given": adapter, "merged": merge([adapter], weights=[1.0])})
    with torch.no_grad(), adapted.route(["given", "merged", None]):
        logits = adapted(input_ids=IDS[:1].repeat(3, 1)).logits
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    assert (logits[0] - logits[2]).abs().max() > 1e-2

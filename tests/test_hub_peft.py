"""The PEFT codec against PEFT itself: what it wrote is read alike, what we write it loads without a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec, BaseModel, TaskInfo
from graftory.config import LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import Hub
from tests.conftest import tiny_batch, tiny_model

TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj"],
}
HEADS = {"t5": ["classification_head"], "vit": ["classifier"]}
T5: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
GENERATORS: dict[str, tuple[str, list[str], Callable[[], Any]]] = {
    "gpt2": (
        "CAUSAL_LM",
        ["c_attn"],
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)),
    ),
    "t5": (
        "SEQ_2_SEQ_LM",
        ["q", "wi"],
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    ),
}


def shake(model: Any, seed: int = 7) -> None:
    """Random values where PEFT starts with zeros, so that every delta counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


def config_for(kind: str, **changes: Any) -> peft.LoraConfig:
    values: dict[str, Any] = {
        "task_type": None if kind == "vit" else "SEQ_CLS",
        "target_modules": TARGETS[kind],
        "modules_to_save": HEADS.get(kind),
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "fan_in_fan_out": kind == "gpt2",
    }
    return peft.LoraConfig(**(values | changes))


def saved_by_peft(kind: str, folder: Path, **changes: Any) -> tuple[Path, Tensor, Tensor]:
    """A LoRA that plain PEFT made and saved: its folder, its logits, the bare base's logits."""
    model = tiny_model(kind)
    bare = logits(model, tiny_batch(kind))
    tuned = peft.get_peft_model(model, config_for(kind, **changes))
    shake(tuned)
    tuned.eval().save_pretrained(str(folder))
    return folder, logits(tuned, tiny_batch(kind)), bare


def loaded_by_peft(kind: str, folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(tiny_model(kind), str(folder)).eval()
    return logits(model, tiny_batch(kind))


def rewritten(hub: Hub, ref: str, folder: Path) -> Path:
    """The adapter written anew by us: tensors out, `put`, files out."""
    adapter = hub.get(ref)
    spec = adapter.spec
    known = replace(spec.base, architecture=folder.name)
    return hub.materialize(hub.put("ours", replace(adapter, spec=replace(spec, base=known))), folder)


def test_peft_to_hub_to_peft_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    folder, expected, bare = saved_by_peft(kind, tmp_path / "peft")
    hub = Hub.create(tmp_path / "hub")
    ref = hub.add(folder, name="theirs")
    ours = rewritten(hub, str(ref), tmp_path / kind)
    assert (expected - bare).abs().max() > 1e-3
    assert torch.equal(loaded_by_peft(kind, ours), expected)


def test_added_files_keep_their_bytes(tmp_path: Path) -> None:
    folder, _, _ = saved_by_peft("bert", tmp_path / "peft")
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.add(folder, name="theirs"), tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_give_peft_s_own_scales(rslora: bool, tmp_path: Path) -> None:
    changes = {
        "use_rslora": rslora,
        "rank_pattern": {"layer.0.attention.self.query": 7, "value": 2},
        "alpha_pattern": {"1.attention.self.query": 9.5, "output.dense": 3},
    }
    folder, expected, _ = saved_by_peft("bert", tmp_path / "peft", **changes)
    hub = Hub.create(tmp_path / "hub")
    ref = hub.add(folder, name="theirs")
    oracle = peft.get_peft_model(tiny_model("bert"), config_for("bert", **changes))
    lora = hub.record(ref).spec.config
    assert isinstance(lora, LoraConfig)
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in oracle.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {path: lora.scale_of(path) for path in lora.targets} == pytest.approx(scales)
    assert torch.equal(loaded_by_peft("bert", rewritten(hub, "theirs", tmp_path / "bert")), expected)


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_generators_without_a_head(kind: str, tmp_path: Path) -> None:
    task_type, targets, make = GENERATORS[kind]

    def base() -> Any:
        torch.manual_seed(0)
        return make().eval()

    batch = {"input_ids": tiny_batch(kind)["input_ids"], "labels": tiny_batch(kind)["input_ids"]}
    config = peft.LoraConfig(task_type=task_type, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    tuned = peft.get_peft_model(base(), config).eval()
    shake(tuned)
    tuned.save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    ref = hub.add(tmp_path / "peft", name="org/theirs")
    task = hub.record(ref).spec.task
    assert task == TaskInfo("theirs", "causal_lm" if kind == "gpt2" else "seq2seq")
    again = peft.PeftModel.from_pretrained(base(), str(rewritten(hub, str(ref), tmp_path / kind))).eval()
    assert type(again) is type(tuned)
    assert torch.equal(logits(again, batch), logits(tuned, batch))


def test_imported_spec_is_read_from_the_files(tmp_path: Path) -> None:
    folder, _, _ = saved_by_peft("bert", tmp_path / "peft", rank_pattern={"query": 2})
    edit(folder, base_model_name_or_path="some/bert", revision="abc")
    hub = Hub.create(tmp_path / "hub")
    spec = hub.record(hub.add(folder, name="theirs")).spec
    paths = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")]
    assert spec.base == BaseModel("some/bert", revision="abc")
    assert isinstance(spec.config, LoraConfig)
    assert set(paths) < set(spec.config.targets)
    assert (spec.config.rank, spec.config.alpha, spec.config.dropout, spec.config.init_seed) == (4, 6.0, 0.1, None)
    assert spec.config.rank_pattern == {paths[0]: 2, paths[2]: 2}
    assert spec.task == TaskInfo("theirs", "classification", labels=("LABEL_0", "LABEL_1"), head=("classifier",))


@pytest.mark.parametrize(
    ("kind", "head", "kind_of_task", "outputs"),
    [
        ("roberta", ("classifier",), "classification", 2),
        ("distilbert", ("classifier", "pre_classifier"), "classification", 2),
        ("t5", ("classification_head",), "classification", 2),
        ("vit", ("classifier",), "classification", 2),
        ("gpt2", ("score",), "classification", 2),
    ],
)
def test_heads_are_found(kind: str, head: tuple[str, ...], kind_of_task: str, outputs: int, tmp_path: Path) -> None:
    folder, _, _ = saved_by_peft(kind, tmp_path / "peft")
    hub = Hub.create(tmp_path / "hub")
    task = hub.record(hub.add(folder, name="theirs")).spec.task
    assert task is not None
    assert (task.head, task.kind, task.outputs) == (head, kind_of_task, outputs)


def test_one_output_is_a_regression(tmp_path: Path) -> None:
    folder, _, _ = saved_by_peft("bert", tmp_path / "peft")
    weights = load_file(folder / "adapter_model.safetensors")
    for name in ("weight", "bias"):
        key = f"base_model.model.classifier.{name}"
        weights[key] = weights[key][:1].clone()
    save_file(weights, folder / "adapter_model.safetensors")
    hub = Hub.create(tmp_path / "hub")
    assert hub.record(hub.add(folder, name="theirs")).spec.task == TaskInfo(
        "theirs", "regression", head=("classifier",)
    )


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small LoRA in PEFT's two files, made by hand."""
    folder = tmp_path / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rewrite(folder, {"l.q.lora_A.weight": torch.ones(2, 3), "l.q.lora_B.weight": torch.ones(5, 2)})
    return folder


def rewrite(folder: Path, tensors: dict[str, Tensor], prefix: str = "base_model.model.") -> None:
    save_file({prefix + key: value for key, value in tensors.items()}, folder / "adapter_model.safetensors")


def refused(folder: Path, tmp_path: Path, error: type[Exception], text: str) -> None:
    hub = Hub.create(tmp_path / "hub")
    with pytest.raises(error, match=text):
        hub.add(folder, name="theirs")
    assert hub.index() == ()
    assert not list((tmp_path / "hub" / ".hub" / "records").rglob("*.json"))


UNSUPPORTED: list[tuple[str, Any]] = [
    ("layer_replication", [[0, 2]]),
    ("megatron_config", {"x": 1}),
    ("trainable_token_indices", [1]),
    ("target_parameters", ["w"]),
    ("alora_invocation_tokens", [3]),
    ("init_lora_weights", "pissa"),
    ("auto_mapping", {"base_model_class": "X", "parent_library": "evil.module"}),
    ("peft_type", "XLORA"),
    ("task_type", "TOKEN_CLS"),
    ("a_feature_of_next_year", {"on": True}),
    ("rank_pattern", {"(a+)+$": 3}),
    ("alpha_pattern", {"^model.q": 3}),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED, ids=[key for key, _ in UNSUPPORTED])
def test_unsupported_is_refused_by_name(key: str, value: Any, folder: Path, tmp_path: Path) -> None:
    edit(folder, **{key: value})
    refused(folder, tmp_path, UnsupportedAdapterError, key)


IMPOSSIBLE: list[tuple[str, Any]] = [
    ("r", "8"),
    ("r", 0),
    ("lora_alpha", None),
    ("lora_dropout", 1.5),
    ("use_rslora", 1),
    ("use_dora", "yes"),
    ("bias", "some"),
    ("lora_bias", 2),
    ("modules_to_save", "classifier"),
    ("rank_pattern", {"q": 0}),
    ("base_model_name_or_path", 3),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE, ids=[f"{key}={value}" for key, value in IMPOSSIBLE])
def test_impossible_value_is_refused(key: str, value: Any, folder: Path, tmp_path: Path) -> None:
    edit(folder, **{key: value})
    refused(folder, tmp_path, CorruptAdapterError, key)


def test_off_features_of_a_newer_peft_are_accepted(folder: Path, tmp_path: Path) -> None:
    edit(folder, a_feature_of_next_year=None, another=False, third={})
    assert str(Hub.create(tmp_path / "hub").add(folder, name="theirs")) == "theirs@1"


def test_target_modules_is_never_evaluated(folder: Path, tmp_path: Path) -> None:
    edit(folder, target_modules="(l+)+$")
    hub = Hub.create(tmp_path / "hub")
    assert hub.record(hub.add(folder, name="theirs")).spec.config.targets == ("l.q",)


PAIR = {"l.q.lora_A.weight": torch.ones(2, 3), "l.q.lora_B.weight": torch.ones(5, 2)}
BAD_TENSORS: list[tuple[dict[str, Tensor], type[Exception], str]] = [
    ({**PAIR, "l.q.lora_magnitude_vector": torch.ones(5)}, UnsupportedAdapterError, "lora_magnitude_vector"),
    ({**PAIR, "e.lora_embedding_A": torch.ones(2, 9)}, UnsupportedAdapterError, "lora_embedding_A"),
    ({**PAIR, "classifier.weight": torch.ones(2, 9)}, UnsupportedAdapterError, "classifier.weight"),
    ({"l.q.lora_A.weight": torch.ones(2, 3)}, CorruptAdapterError, "only one of"),
    ({**PAIR, "l.q.lora_B.weight": torch.ones(5, 3)}, CorruptAdapterError, "wanted \\[r, in\\]"),
    ({**PAIR, "l.q.lora_A.weight": torch.full((2, 3), torch.nan)}, CorruptAdapterError, "NaN"),
    ({**PAIR, "l.q.lora_A.weight": torch.full((2, 3), torch.inf).half()}, CorruptAdapterError, "NaN or infinity"),
    ({**PAIR, "l.q.lora_A.weight": torch.full((2, 3), -torch.inf).bfloat16()}, CorruptAdapterError, "NaN or infinity"),
    ({**PAIR, "l.q.lora_A.weight": torch.ones(2, 3).char()}, UnsupportedAdapterError, "I8"),
    (
        {"l.q.lora_A.weight": torch.ones(3, 3), "l.q.lora_B.weight": torch.ones(5, 3)},
        CorruptAdapterError,
        "rank 3, adapter_config.json says 2",
    ),
    (
        {"l.q.lora_A.weight": torch.ones(2, 3, 1, 1), "l.q.lora_B.weight": torch.ones(5, 2, 1, 1)},
        UnsupportedAdapterError,
        "linear layers",
    ),
]


@pytest.mark.parametrize(("tensors", "error", "text"), BAD_TENSORS, ids=[text for _, _, text in BAD_TENSORS])
def test_bad_tensors_are_refused(
    tensors: dict[str, Tensor], error: type[Exception], text: str, folder: Path, tmp_path: Path
) -> None:
    rewrite(folder, tensors)
    refused(folder, tmp_path, error, text)


def test_keys_without_peft_s_prefix_are_refused(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, PAIR, prefix="model.")
    refused(folder, tmp_path, UnsupportedAdapterError, "prefix")


def test_trained_embedding_is_refused(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, {**PAIR, "model.embed_tokens.weight": torch.ones(9, 3)})
    edit(folder, modules_to_save=["embed_tokens"])
    refused(folder, tmp_path, UnsupportedAdapterError, "embed_tokens")


def test_pickle_is_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, tmp_path, UnsupportedAdapterError, "adapter_model.bin.*weights_only=True")


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, tmp_path, CorruptAdapterError, "adapter_model.safetensors is missing")


def spec_of(*targets: str, **changes: Any) -> AdapterSpec:
    return AdapterSpec(BaseModel("b"), LoraConfig(targets=targets, rank=2, **changes))


def test_a_path_that_ends_like_another_keeps_its_own_rank(tmp_path: Path) -> None:
    """PEFT's pattern `q` would catch `l.q` too; the files must still say 3 for one and 2 for the other."""
    tensors = {
        "q.lora_A.weight": torch.ones(3, 4),
        "q.lora_B.weight": torch.ones(4, 3),
        "l.q.lora_A.weight": torch.ones(2, 4),
        "l.q.lora_B.weight": torch.ones(4, 2),
    }
    adapter = Adapter(spec_of("q", "l.q", rank_pattern={"q": 3}), tensors)
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.put("a", adapter), tmp_path / "out")
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "l": torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})})
    loaded = peft.PeftModel.from_pretrained(base, str(out))
    ranks = {
        name: module.r["default"]
        for name, module in loaded.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ranks == {"base_model.model.q": 3, "base_model.model.l.q": 2}


def test_put_refuses_tensors_that_the_spec_does_not_list(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    with pytest.raises(UnsupportedAdapterError, match=r"classifier\.weight"):
        hub.put("a", Adapter(spec_of("l.q"), {**PAIR, "classifier.weight": torch.ones(2, 3)}))
    with pytest.raises(CorruptAdapterError, match=r"l\.k"):
        hub.put("a", Adapter(spec_of("l.q", "l.k"), PAIR))
    assert hub.index() == ()


def test_sidecar_that_disagrees_is_refused(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.put("a", Adapter(spec_of("l.q"), PAIR)), tmp_path / "out")
    sidecar = json.loads((out / "graftory.json").read_text())
    sidecar["spec"]["config"]["alpha"] = 17.0
    (out / "graftory.json").write_text(json.dumps(sidecar))
    with pytest.raises(CorruptAdapterError, match="scaled by"):
        hub.add(out, name="b")


def test_base_argument_overrides_and_fills(folder: Path, tmp_path: Path) -> None:
    edit(folder, base_model_name_or_path="x/y", revision="abc")
    hub = Hub.create(tmp_path / "hub")
    filled = hub.add(folder, name="a", base=BaseModel("x/y", architecture="bert"))
    other = hub.add(folder, name="b", base=BaseModel("z"))
    assert hub.record(filled).spec.base == BaseModel("x/y", revision="abc", architecture="bert")
    assert hub.record(other).spec.base == BaseModel("z")

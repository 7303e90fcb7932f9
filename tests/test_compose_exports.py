"""Models written tensor by tensor, against plain PEFT, the export in memory, and what transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, Parent
from graftory.adapters import attach, base_of
from graftory.compose import Source, export, export_folder, save_export
from graftory.compose.exports import changes, writer
from graftory.config import AdapterConfig, BitfitConfig, DoraConfig, Ia3Config, LoraConfig
from graftory.errors import BaseMismatchError, ConfigError, DataError, MergeError, ShapeError
from tests.adapter_samples import make

IDS = torch.tensor([[3, 5, 7, 9], [4, 6, 8, 2]])
# transformers 5.23 warns of a name that PEFT 0.21 still uses
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

_SIZES: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT: dict[str, Any] = {**_SIZES, "intermediate_size": 24, "initializer_range": 0.2}
_T5: dict[str, Any] = {
    "vocab_size": 24,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT))


def gpt2() -> Any:
    config: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, **config))


def llama(tied: bool) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_BERT, tie_word_embeddings=tied))


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5))


def vit() -> Any:
    sizes: dict[str, Any] = {**_BERT, "image_size": 8, "patch_size": 4, "num_labels": 3}
    del sizes["vocab_size"]
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def saved(build: Any, folder: Path, **options: Any) -> Any:
    """The model, and its folder."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder, **options)
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    if model.config.model_type == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {})


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits  # type: ignore[no-any-return]


def with_peft(model: Any, targets: list[str], **fields: Any) -> tuple[Tensor, Adapter]:
    """The logits of plain PEFT with random factors, and the same adapter as data."""
    base = base_of(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **fields)).eval()
    torch.manual_seed(1)
    tensors = {}
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            tensors[name.removeprefix("base_model.model.").replace(".default", "")] = parameter.detach().clone()
    paths = tuple(dict.fromkeys(key.split(".lora_")[0] for key in tensors))
    logits = logits_of(wrapped)
    wrapped.unload()
    return logits, Adapter(AdapterSpec(base, LoraConfig(rank=4, alpha=6.0, targets=paths)), tensors)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


CASES = [
    (bert, ["query", "value", "dense"], {}, "safetensors"),
    (bert, ["query"], {}, "pickle"),
    (gpt2, ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}, "shards"),
    (lambda: llama(False), ["q_proj", "down_proj", "lm_head"], {}, "shards"),
    (lambda: llama(True), ["q_proj", "gate_proj"], {}, "safetensors"),
    (t5, ["q", "v", "wi", "wo"], {}, "pickle"),
    (vit, ["q_proj", "fc1"], {}, "shards"),
]


@pytest.mark.parametrize(("build", "targets", "fields", "stored"), CASES)
def test_a_folder_gives_what_plain_peft_gives(
    tmp_path: Path, build: Any, targets: list[str], fields: dict[str, Any], stored: str
) -> None:
    model = saved(build, tmp_path / "base", max_shard_size="4KB" if stored == "shards" else "1GB")
    if stored == "pickle":
        tensors = {name: tensor.clone() for name, tensor in tensors_in(tmp_path / "base").items()}
        (tmp_path / "base" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    bare = logits_of(model)
    wanted, adapter = with_peft(model, targets, **fields)
    done = export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", max_shard_size="5KB")
    loaded = type(model).from_pretrained(tmp_path / "plain").eval()
    assert (wanted - bare).abs().max() > 1e-3
    assert (logits_of(loaded) - wanted).abs().max() < 1e-5
    assert len(done.files) > 1
    # the same tensors, bit for bit and by the same names, as the way through memory
    torch.manual_seed(0)
    save_export(export(build().eval(), adapter), None, tmp_path / "memory")
    streamed, kept = tensors_in(tmp_path / "plain"), tensors_in(tmp_path / "memory")
    assert set(streamed) == set(kept)
    assert all(torch.equal(streamed[name], tensor) for name, tensor in kept.items())
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "memory"))
    assert ours == theirs


def test_shards_are_no_larger_than_asked_and_say_where_each_tensor_is(tmp_path: Path) -> None:
    model = saved(bert, tmp_path / "base")
    adapter = make(model, LoraConfig(rank=2))
    done = export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", max_shard_size=6000)
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(done.files)
    assert (
        index["metadata"]["total_size"] == done.size == sum(t.nbytes for t in tensors_in(tmp_path / "plain").values())
    )
    for file in done.files:
        with safe_open(tmp_path / "plain" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
            assert sum(opened.get_tensor(name).nbytes for name in names) <= 6000 or len(names) == 1
            assert all(index["weight_map"][name] == file for name in names)
    with pytest.raises(ConfigError, match="max_shard_size: got 'big'"):
        export_folder(str(tmp_path / "base"), adapter, tmp_path / "other", max_shard_size="big")


METHODS: list[AdapterConfig] = [
    LoraConfig(rank=3, alpha=5.0, rslora=True),
    DoraConfig(rank=3),
    Ia3Config(),
    BitfitConfig(),
]


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@pytest.mark.parametrize("build", [bert, gpt2])
def test_blocks_of_rows_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: AdapterConfig, build: Any
) -> None:
    """A weight folded a few rows at a time, and its bias, equal base + adapter; no two blocks see each other."""
    model = saved(build, tmp_path / "base")
    adapter = make(model, config, labels=3 if build is bert else 0)
    monkeypatch.setattr(changes, "BLOCK", 40)
    export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain")
    adapted = attach(model, {"a": adapter})
    with torch.no_grad(), adapted.route("a"):
        wanted = adapted(input_ids=IDS).logits
    loaded = type(model).from_pretrained(tmp_path / "plain").eval()
    assert (logits_of(loaded) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kept", "asked"), [(torch.bfloat16, None), (torch.float16, None), (torch.float32, "bfloat16")]
)
def test_weights_are_in_the_bases_type_and_rounded_once(tmp_path: Path, kept: torch.dtype, asked: str | None) -> None:
    torch.manual_seed(0)
    model: Any = llama(True).to(kept)
    model.save_pretrained(tmp_path / "base")
    adapter = make(model.float(), LoraConfig(rank=4, alpha=2.0))
    done = export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", dtype=asked)
    wanted = torch.bfloat16 if asked else kept
    assert done.dtype == str(wanted).removeprefix("torch.")
    path = adapter.spec.config.targets[0]
    a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    old, new = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "plain")
    assert all(tensor.dtype == wanted for tensor in new.values())
    assert torch.equal(new[f"{path}.weight"], (old[f"{path}.weight"].double() + 0.5 * b @ a).to(wanted))
    assert type(model).from_pretrained(tmp_path / "plain").dtype == wanted
    with pytest.raises(ConfigError, match="dtype: got 'int8', wanted one of float32"):
        export_folder(str(tmp_path / "base"), adapter, tmp_path / "other", dtype="int8")


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that tensors made below it hold at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.device.type == "cpu":
                self._count(one.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def test_a_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Twelve layers of 1.2 MB: what is live at once is a few of its tensors, not the model."""
    config: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12, "vocab_size": 64}
    model = saved(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, num_attention_heads=4)),
        tmp_path / "base",
    )
    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    adapter = make(model, LoraConfig(rank=4, targets=("all",)))
    del model
    with Live() as live:
        export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", max_shard_size="1MB")
    assert live.most > largest  # it does count
    # one weight, and the same in fp64 for old, product and sum
    assert live.most < 10 * largest < whole / 4


KILLED = """
import os, sys
from graftory.adapter import Adapter, AdapterSpec, BaseModel
from graftory.compose import export_folder
from graftory.config import LoraConfig
import torch

def stop(name, done, total):
    if done > total // 2:
        os._exit(9)

path = "model.layers.0.self_attn.q_proj"
tensors = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
adapter = Adapter(AdapterSpec(BaseModel("tiny"), LoraConfig(rank=2, targets=(path,))), tensors)
export_folder(sys.argv[1], adapter, sys.argv[2], progress=stop if sys.argv[3] == "kill" else None)
"""


def test_a_killed_export_leaves_no_folder_and_the_next_one_sweeps_up(tmp_path: Path) -> None:
    saved(lambda: llama(False), tmp_path / "base")
    out = tmp_path / "out" / "plain"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "base"), str(out), "kill"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, check=False, env=environment, capture_output=True).returncode == 9
    assert not out.exists()
    (left,) = out.parent.iterdir()
    assert left.name.endswith(".partial")
    path = "model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
    adapter = Adapter(AdapterSpec(BaseModel("tiny"), LoraConfig(rank=2, alpha=2.0, targets=(path,))), tensors)
    export_folder(str(tmp_path / "base"), adapter, out)
    assert list(out.parent.iterdir()) == [out]
    old, new = tensors_in(tmp_path / "base"), tensors_in(out)
    assert torch.equal(new[f"{path}.weight"], (old[f"{path}.weight"].double() + 2.0).float())


def test_progress_tells_every_byte(tmp_path: Path) -> None:
    model = saved(bert, tmp_path / "base")
    told: list[tuple[str, int, int]] = []
    done = export_folder(
        str(tmp_path / "base"),
        make(model, LoraConfig(rank=2)),
        tmp_path / "plain",
        progress=lambda *each: told.append(each),
    )
    assert told[0][1] == 0
    assert told[-1] == ("", done.size, done.size)
    assert [each[1] for each in told] == sorted(each[1] for each in told)
    assert {name for name, _, _ in told[:-1]} == set(tensors_in(tmp_path / "plain"))


def test_what_the_files_lack_is_as_when_the_base_is_loaded(tmp_path: Path) -> None:
    """A pooler that was never saved is drawn anew, always the same; the adapter was trained on that one."""
    from graftory.training import load_base
    from tests.training_samples import tokenizer_of

    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**_BERT), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    tokenizer_of("bert").save_pretrained(tmp_path / "base")
    loaded = load_base(str(tmp_path / "base"), "classification")
    adapter = make(loaded.model, LoraConfig(rank=2), labels=3)
    done = export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", batches=[{"input_ids": IDS}])
    assert done.check is not None
    assert done.check.max_difference < 1e-5
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain.bert.pooler.dense.weight, loaded.model.get_parameter("bert.pooler.dense.weight"))
    assert plain.config.id2label == {0: "label 0", 1: "label 1", 2: "label 2"}


def test_a_tied_weight_that_the_files_keep_twice_is_folded_alone(tmp_path: Path) -> None:
    """The configuration says tied, the files do not: transformers believes the files, and so does the export."""
    model = saved(lambda: llama(False), tmp_path / "base")
    wanted, adapter = with_peft(model, ["lm_head"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert (logits_of(loaded) - wanted).abs().max() < 1e-5
    saved(lambda: llama(True), tmp_path / "tied")
    with pytest.raises(MergeError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        export_folder(
            str(tmp_path / "tied"), replace(adapter, spec=replace(adapter.spec, base=BaseModel("x"))), tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = saved(bert, tmp_path / "base")
    adapter = make(model, LoraConfig(rank=2), labels=3)
    other = saved(lambda: bert().apply(lambda each: None), tmp_path / "other")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="pass the right base"):
        export_folder(str(tmp_path / "other"), adapter, tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    with pytest.raises(DataError, match=r"no weights; wanted one of model\.safetensors"):
        export_folder(
            str(tmp_path / "empty"), replace(adapter, spec=replace(adapter.spec, task=None)), tmp_path / "plain"
        )
    path = adapter.spec.config.targets[0]
    short = {**adapter.tensors, f"{path}.lora_B.weight": torch.ones(8, 2)}
    anywhere = replace(adapter.spec, base=BaseModel("tiny"), task=None)
    with pytest.raises(ShapeError, match="an update of 8 outputs"):
        export_folder(str(tmp_path / "base"), Adapter(anywhere, short), tmp_path / "plain")
    assert {each.name for each in tmp_path.iterdir()} == {"base", "other", "empty"}


def test_a_wrong_model_is_found_out_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(bert, tmp_path / "base")
    adapter = make(model, LoraConfig(rank=2))
    real = changes.plan

    def forgetful(*arguments: Any) -> changes.Plan:
        found = real(*arguments)
        return replace(found, changes=dict(list(found.changes.items())[2:]))

    monkeypatch.setattr("graftory.compose.exports.stream.plan", forgetful)
    with pytest.raises(MergeError, match=r"differs from base \+ adapter by"):
        export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", batches=[{"input_ids": IDS}])
    assert {each.name for each in tmp_path.iterdir()} == {"base"}


def test_a_tensor_that_is_not_written_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(bert, tmp_path / "base")
    real = writer.write_shards

    def short(folder: Path, planned: Any, **options: Any) -> Any:
        return real(folder, [each for each in planned if each.name != "bert.pooler.dense.bias"], **options)

    monkeypatch.setattr("graftory.compose.exports.stream.write_shards", short)
    with pytest.raises(MergeError, match=r"does not find bert\.pooler\.dense\.bias in what was written"):
        export_folder(
            str(tmp_path / "base"), make(model, LoraConfig(rank=2)), tmp_path / "plain", batches=[{"input_ids": IDS}]
        )
    assert {each.name for each in tmp_path.iterdir()} == {"base"}


def test_the_card_says_where_it_comes_from_and_what_was_measured(tmp_path: Path) -> None:
    model = saved(bert, tmp_path / "base")
    adapter = make(model, LoraConfig(rank=2), labels=3)
    parent = Parent("sst2@1", "sha256:" + "a" * 64, "merged", 0.25)
    lineage = Lineage("merge", (parent,), seed=7)
    adapter = replace(adapter, spec=replace(adapter.spec, lineage=lineage, licence="MIT"))
    done = export_folder(
        str(tmp_path / "base"),
        Source(adapter, "both@3", "sha256:" + "b" * 64),
        tmp_path / "plain",
        kind=None,
        batches=[{"input_ids": IDS}],
    )
    check = done.check
    assert check is not None
    assert 0 < check.max_difference < 1e-5
    assert (check.n, done.dtype) == (2, "float32")
    report = json.loads((tmp_path / "plain" / "graftory_export.json").read_text())
    assert report["check"]["max_difference"] == check.max_difference
    assert report["check"]["rows"] == 2
    assert report["adapter"] == {"ref": "both@3", "digest": "sha256:" + "b" * 64, "method": "lora"}
    assert report["lineage"]["parents"][0]["weight"] == 0.25
    card = (tmp_path / "plain" / "README.md").read_text()
    for said in ("both@3", "sst2@1", "(merged, weight 0.25)", "license: MIT", f"{check.max_difference:.2e}", "seed: 7"):
        assert said in card
